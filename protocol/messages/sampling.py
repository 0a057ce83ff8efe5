"""How one request's tokens are chosen; travels from gateway to router to engine unchanged."""

from __future__ import annotations

import math

import msgspec

from microserve.protocol.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Decoding parameters of one sequence; the defaults are greedy-free OpenAI ones."""

    max_tokens: int = 16
    """Most output tokens, including a stop token."""
    min_tokens: int = 0
    """End-of-sequence and stop ids cannot be chosen before this many output tokens."""
    temperature: float = 1.0
    """0 is greedy: the lowest token id of the highest logit."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output (CTRL, 1909.05858)."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Both count output tokens only, as OpenAI's do."""
    logit_bias: dict[int, float] = {}
    seed: int = 0
    """Key of the counter-based randomness; the counter is the token's position in the sequence."""
    logprobs: int | None = None
    """None: none. n >= 0: the chosen token's log-probability and those of the n likeliest."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def validate(self, vocab_size: int) -> None:
        """Raise :class:`InvalidRequest` naming the first field that is out of bounds."""

        def check(ok: bool, field: str, bound: str) -> None:
            if not ok:
                raise InvalidRequest(f"{field} must be {bound}", field=field)

        floats = (self.temperature, self.top_p, self.min_p, self.repetition_penalty)
        check(all(map(math.isfinite, floats)), "temperature", "finite, as top_p, min_p, repetition_penalty")
        check(self.max_tokens >= 1, "max_tokens", "at least 1")
        check(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "between 0 and max_tokens")
        check(0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100")
        check(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        check(self.top_k >= 0, "top_k", "0 (off) or more")
        check(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        check(0.0 < self.repetition_penalty <= 100.0, "repetition_penalty", "above 0 and at most 100")
        check(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "between -2 and 2")
        check(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "between -2 and 2")
        check(len(self.logit_bias) <= MAX_LOGIT_BIAS, "logit_bias", f"at most {MAX_LOGIT_BIAS} entries")
        check(all(0 <= t < vocab_size for t in self.logit_bias), "logit_bias", f"ids below {vocab_size}")
        check(all(-100.0 <= b <= 100.0 for b in self.logit_bias.values()), "logit_bias", "within +-100")
        check(0 <= self.seed < 2**63, "seed", "between 0 and 2**63 - 1")
        check(self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", f"0 to {MAX_LOGPROBS}")
        stops = self.stop_token_ids
        check(len(stops) <= MAX_STOP_TOKEN_IDS, "stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} ids")
        check(all(0 <= t < vocab_size for t in stops), "stop_token_ids", f"below {vocab_size}")
