"""Families of requests by strategy, version and share: the gateway's and the router's, under a name each."""

from __future__ import annotations

from dataclasses import dataclass

from microserve.protocol.metrics.bounds import STRATEGY_BOUNDS
from microserve.protocol.metrics.family import Family, counter, histogram

LABELS = ("strategy", "version", "share")


@dataclass(frozen=True, slots=True)
class StrategyFamilies:
    requests: Family
    moves: Family
    engines: Family
    tokens: dict[str, Family]
    """By field of ``Usage``."""
    times: dict[str, Family]

    @property
    def all(self) -> tuple[Family, ...]:
        return (self.requests, self.moves, *self.tokens.values(), *self.times.values(), self.engines)


_TOKENS = {
    "prompt_tokens": "Prompt tokens, by strategy.",
    "cached_tokens": "Those of them that the engine's cache had.",
    "received_tokens": "Those of them that another engine computed.",
    "output_tokens": "Output tokens, by strategy.",
}
_TIMES = {
    "time_to_first_token": "Router's receipt to first token, by strategy.",
    "time_per_output_token": "Of each output token after the first, by strategy.",
    "job_completion": "Router's receipt to the end, by strategy.",
}


def strategy_families(prefix: str) -> StrategyFamilies:
    return StrategyFamilies(
        requests=counter(f"{prefix}_requests", "Requests by strategy and result.", *LABELS, "result"),
        moves=counter(f"{prefix}_moves", "Moves to another engine in a request's midst.", *LABELS),
        engines=counter(
            f"{prefix}_engine_requests",
            "Requests by strategy and the engine that generated.",
            *("strategy", "version", "engine"),
        ),
        tokens={
            name: counter(f"{prefix}_{name}", text, *LABELS, unit="tokens") for name, text in _TOKENS.items()
        },
        times={
            name: histogram(f"{prefix}_{name}_seconds", text, *LABELS, bounds=STRATEGY_BOUNDS)
            for name, text in _TIMES.items()
        },
    )
