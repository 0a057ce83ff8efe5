"""What came out of a simulated run: times over all requests, by prompt length, by engine, of each one.

Plain figures, and how those of several seeds become one. Knows no mesh (measure.py fills them in).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TypeVar, cast

import msgspec
import numpy as np

T = TypeVar("T")


class Spread(msgspec.Struct, frozen=True):
    """Of one time over all requests that were served, in seconds; 0 without any."""

    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            return cls()
        p50, p90, p99 = np.percentile(values, (50, 90, 99))
        return cls(*(round(float(value), 6) for value in (np.mean(values), p50, p90, p99)))


class LengthBucket(msgspec.Struct, frozen=True):
    """Requests whose prompts are about as long."""

    from_tokens: int
    below_tokens: int
    """Twice as many."""
    num_requests: int
    num_served: int
    ttft_s: Spread


class EngineUse(msgspec.Struct, frozen=True):
    """What one engine did, all its lives together."""

    engine_id: str
    busy_share: float
    """Of the run's time, that in which a step ran there."""
    prompt_tokens: int
    """Computed there; real tokens."""
    output_tokens: int
    """Sampled there, delivered or not; real tokens."""
    kv_share: float
    """Of its blocks that requests held, the mean over time."""
    kv_peak_share: float
    num_requests: int
    """In which it took part, as far as they had an end."""


class PointResult(msgspec.Struct, frozen=True):
    """What came out."""

    strategy: str
    load: float
    profile: str
    num_engines: int
    labels: list[str]
    num_requests: int
    num_served: int
    num_refused: int
    """At once, with a hint when to come again."""
    num_failed: int
    ttft_s: Spread
    tpot_s: Spread
    jct_s: Spread
    slo_share: float
    """Of all requests, those served within both bounds."""
    goodput_per_s: float
    """That share of the load."""
    hit_rate: float
    """Of the served requests' prompt tokens, those that no engine computed; below 0: some twice."""
    sent_gb: float
    """KV put from engine to engine."""
    span_s: float
    """From the first request to the last answer, virtual seconds."""
    scale: int
    digest: str
    """Of all that happened, in order."""
    seed: int = 0
    by_length: list[LengthBucket] = []
    """Shortest first; those without any request are left out."""
    engines: list[EngineUse] = []


class Row(msgspec.Struct, frozen=True):
    """One request of a run. Times in seconds, tokens are real ones."""

    strategy: str
    load: float
    seed: int
    request: int
    """Its number in the trace, as far as that was read."""
    at_s: float
    """When it came, after the first one."""
    tenant: str
    priority: int
    attributes: dict[str, str]
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt, in the cache of the engine that generated."""
    received_tokens: int
    """Of the prompt, sent there by others."""
    output_tokens: int
    """That came; less than asked for where it failed, or was capped."""
    outcome: str
    """``length``, or an error's code."""
    ttft_s: float | None
    """None: no token came."""
    tpot_s: float | None
    jct_s: float
    """Until its end, whatever that was."""
    engines: list[str]
    why: str
    """How they were chosen, as the router's line says."""


def middle(values: Sequence[T]) -> T:
    """The median of each figure, for itself, over results of the same request list under other seeds; what is
    no figure is as in the first."""
    first = values[0]
    if isinstance(first, bool | str):
        return first
    if isinstance(first, int):
        return cast(T, round(statistics.median(cast(Sequence[int], values))))
    if isinstance(first, float):
        return cast(T, statistics.median(cast(Sequence[float], values)))
    if isinstance(first, list):
        return cast(T, [middle(each) for each in zip(*cast(Sequence[list[object]], values), strict=True)])
    fields = {
        name: middle([getattr(value, name) for value in values])
        for name in cast(msgspec.Struct, first).__struct_fields__
    }
    return type(first)(**fields)
