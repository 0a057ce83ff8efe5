"""How a request ended, as the strategy that decided about it is told (``@strategy(on_end=...)``). Plain."""

from __future__ import annotations

from dataclasses import dataclass

from microserve.protocol.messages.router import Ended


@dataclass(frozen=True, slots=True)
class Outcome:
    """Times are of the router's clock, from when the request came to it."""

    reason: str
    """``stop``, ``length``, ``abort`` (the client went) or ``error``."""
    code: str
    """Of the error; empty without one."""
    total_s: float
    ttft_s: float | None
    """Until the first token; None: there was none."""
    tpot_s: float | None
    """For each token after the first; None: there were none."""
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    """Of the prompt, in the cache of the engine that generated."""
    num_received_tokens: int
    """Of the prompt, sent there by others."""
    engines: tuple[str, ...]
    """That took part, in order of first use; the last one generated if the request ended well."""
    strategy: str
    version: int
    """Under which it was served. A shadow hears of requests that another version has served."""
    is_own: bool
    """All of it went as that strategy wanted: it made no mistake, and no engine failed under it."""

    @property
    def is_good(self) -> bool:
        """The answer came whole."""
        return self.reason in ("stop", "length")


def outcome_of(ended: Ended, *, is_own: bool) -> Outcome:
    usage, phases = ended.usage, ended.phases
    num_output = usage.output_tokens
    return Outcome(
        reason=ended.reason,
        code=ended.code,
        total_s=phases.total_s,
        ttft_s=phases.total_s - phases.decoded_s if num_output else None,
        tpot_s=phases.decoded_s / (num_output - 1) if num_output > 1 else None,
        num_prompt_tokens=usage.prompt_tokens,
        num_output_tokens=num_output,
        num_cached_tokens=usage.cached_tokens,
        num_received_tokens=usage.received_tokens,
        engines=tuple(ended.engines),
        strategy=ended.strategy,
        version=ended.strategy_version,
        is_own=is_own,
    )
