"""How one request's tokens are chosen; travels from gateway to router to engine unchanged.

Every bound is said once, in a type below: clients' fields have these types (gateway/openai/schema.py), and
routers and engines check by them what comes from a gateway. All whole numbers fit 64 bits, signed.
"""

from __future__ import annotations

import math
from operator import attrgetter
from typing import Annotated

import msgspec
from msgspec import Meta

from microserve.protocol.errors import InvalidRequest, located

MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_GRAMMAR_NBYTES = 1 << 18
"""Of a grammar's text, in UTF-8; a JSON schema in it is bounded further."""
MAX_AFTER_TOKEN_IDS = 16
MAX_COUNT = (1 << 31) - 1
"""Of tokens, where nothing narrower holds."""

MAX_TOKEN_ID = 0xFFFF_FFFF

TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID)]
"""On the wire an id is 32 bits; the model's vocabulary bounds it further."""
MaxTokens = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
MaxTokensOrNone = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
"""0: the prompt alone."""
MinTokens = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
Temperature = Annotated[float, Meta(ge=0.0, le=100.0)]
TopP = Annotated[float, Meta(gt=0.0, le=1.0)]
TopK = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
MinP = Annotated[float, Meta(ge=0.0, le=1.0)]
RepetitionPenalty = Annotated[float, Meta(gt=0.0, le=100.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, Meta(ge=-100.0, le=100.0)]],
    Meta(max_length=MAX_LOGIT_BIAS, extra_json_schema={"propertyNames": {"pattern": "^(0|[1-9][0-9]*)$"}}),
]
Seed = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Logprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]


class _Bounds(msgspec.Struct, frozen=True):
    """The fields of :class:`SamplingParams` that have bounds of their own."""

    max_tokens: MaxTokensOrNone
    min_tokens: MinTokens
    temperature: Temperature
    top_p: TopP
    top_k: TopK
    min_p: MinP
    repetition_penalty: RepetitionPenalty
    presence_penalty: Penalty
    frequency_penalty: Penalty
    logit_bias: LogitBias
    seed: Seed
    logprobs: Logprobs | None
    stop_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_STOP_TOKEN_IDS)]
    prompt_logprobs: Logprobs | None


GRAMMAR_KINDS = ("json_schema", "json_object", "regex", "choice", "lark")


class Grammar(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What the output may be: its text is one of the grammar, to the end, and nothing else."""

    kind: str
    """``json_schema``: ``text`` is a schema; ``json_object``: any object, no text; ``regex``; ``choice``: a
    JSON list of strings, one of which it is; ``lark``: a grammar with a rule ``start``."""
    text: str = ""
    after_token_ids: tuple[int, ...] = ()
    """The grammar begins behind the first place of the output where these stand in a row, and until then the
    output cannot end; none: it begins at once."""

    def validate(self, vocab_size: int) -> None:
        """Raise :class:`InvalidRequest` for what no grammar can be. Whether it is one is not looked at."""
        if self.kind not in GRAMMAR_KINDS:
            raise InvalidRequest(f"grammar.kind must be one of {', '.join(GRAMMAR_KINDS)}", field="grammar")
        if (
            len(self.text) > MAX_GRAMMAR_NBYTES
            or len(self.text.encode(errors="replace")) > MAX_GRAMMAR_NBYTES
        ):
            raise InvalidRequest(f"a grammar may have {MAX_GRAMMAR_NBYTES} bytes at most", field="grammar")
        if bool(self.text) == (self.kind == "json_object"):
            raise InvalidRequest(
                f"a grammar of kind {self.kind} needs {'no' if self.text else 'a'} text", field="grammar"
            )
        if len(self.after_token_ids) > MAX_AFTER_TOKEN_IDS:
            raise InvalidRequest(
                f"a grammar begins after {MAX_AFTER_TOKEN_IDS} tokens at most", field="grammar"
            )
        if any(not 0 <= token < vocab_size for token in self.after_token_ids):
            raise InvalidRequest(f"grammar.after_token_ids must be ids below {vocab_size}", field="grammar")


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Decoding parameters of one sequence; the defaults are greedy-free OpenAI ones.

    Decoding one does not check its bounds, as that could only refuse a whole message: :meth:`validate` does.
    """

    max_tokens: int = 16
    """Most output tokens, including a stop token. 0: the prompt is computed, and nothing is generated."""
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
    """Of no effect with a grammar, which says where the output may end."""
    grammar: Grammar | None = None
    prompt_logprobs: int | None = None
    """None: none. n >= 0: the log-probability of each prompt token and those of the n likeliest there."""

    def ends_by_eos(self) -> bool:
        """Does a token that is an end of sequence end it?"""
        return not self.ignore_eos or self.grammar is not None

    def validate(self, vocab_size: int) -> None:
        """Raise :class:`InvalidRequest` naming the first field that is out of bounds."""
        for name, number in zip(_FLOATS, _floats(self), strict=True):
            if not math.isfinite(number):  # no bound tells NaN from a number
                raise InvalidRequest(f"{name} must be finite", field=name)
        if self.logit_bias and not all(map(math.isfinite, self.logit_bias.values())):
            raise InvalidRequest("logit_bias must be finite", field="logit_bias")
        try:
            msgspec.convert(self, _Bounds, from_attributes=True)
        except msgspec.ValidationError as error:
            path, message = located(error)
            field = path.partition("[")[0]
            raise InvalidRequest(f"{field}: {message}", field=field) from None
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest("min_tokens must be between 0 and max_tokens", field="min_tokens")
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            if ids and max(ids) >= vocab_size:
                raise InvalidRequest(f"{name} must have ids below {vocab_size}", field=name)
        if self.grammar is not None:
            self.grammar.validate(vocab_size)


_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_floats = attrgetter(*_FLOATS)
