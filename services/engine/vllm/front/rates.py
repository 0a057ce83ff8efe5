"""How fast vLLM computes and what its time goes to, as far as its outputs tell (``EngineLoad``)."""

from __future__ import annotations

from collections.abc import Collection

from microserve.services.engine.core.measure.share import Share
from microserve.services.engine.vllm.front.running import Running

SHARE = 0.2
"""Of a new measurement in a mean."""
LOOK_S = 0.02
"""Between two looks at what the time goes to: each of many requests brings an output a step."""
MIN_PREFILL_TOKENS = 16
"""Fewer say more about a step than about tokens."""


class Rates:
    def __init__(self) -> None:
        self.prefill_tokens_per_s = 0.0
        self.decode_step_s = 0.0
        self.mean_output_tokens = 0.0
        self._measured_at: float | None = None

    def prefill_rate_age_s(self, now: float) -> float:
        return 0.0 if self._measured_at is None else now - self._measured_at

    def measure(self, running: Running, num_tokens: int, now: float) -> None:
        """New tokens of a request have come; keeps when."""
        if running.first_token_at is None:
            running.first_token_at = now
            computed = len(running.token_ids) - running.cached_tokens - running.received_tokens
            took_s = now - (running.ready_at or running.arrived_at)
            if computed >= MIN_PREFILL_TOKENS and took_s > 0 and not running.is_early:
                self.prefill_tokens_per_s = _mean(self.prefill_tokens_per_s, computed / took_s)
                self._measured_at = now
        elif running.last_token_at is not None and now > running.last_token_at:
            self.decode_step_s = _mean(self.decode_step_s, (now - running.last_token_at) / num_tokens)
        running.last_token_at = now

    def ended(self, num_output_tokens: int) -> None:
        self.mean_output_tokens = _mean(self.mean_output_tokens, float(num_output_tokens))


class Occupancy:
    """What its time goes to. vLLM says of a step neither when it began nor what was in it, so time counts as
    prefill while any request has no token yet, as decode while others have, as transfer while all that there
    are wait for KV, else as nothing. ``look`` whenever a request comes, goes on or ends, before reading."""

    def __init__(self) -> None:
        self.decode, self.transfer, self.idle = Share(), Share(), Share()
        self._prefill = Share()
        self._now_in = self.idle
        self._looked_at: float | None = None

    def look(self, live: Collection[Running], awaiting_kv: Collection[Running], now: float) -> None:
        """``awaiting_kv``: of the ``live`` ones, those whose KV is on its way."""
        if self._looked_at is not None:
            if now - self._looked_at < LOOK_S:
                return
            self._now_in.spent(now - self._looked_at, now)
        self._looked_at = now
        computed = [each for each in live if not each.is_parked and each not in awaiting_kv]
        if any(each.first_token_at is None for each in computed):
            self._now_in = self._prefill
        elif computed:
            self._now_in = self.decode
        else:
            self._now_in = self.transfer if awaiting_kv else self.idle


def _mean(before: float, new: float) -> float:
    return new if not before else before + SHARE * (new - before)
