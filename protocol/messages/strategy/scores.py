"""How versions of strategies fare in routers, and how a canary goes on by it (WIRE.md 6.4, 6.7).

Sums and counts, so that those of several routers are added and nothing is lost by it. Numbers and names only.
"""

from __future__ import annotations

import math

import msgspec

STABLE, CANARY = SHARES = "stable", "canary"
"""As what a version serves a request."""

BUCKETS_PER_DOUBLING = 8
"""Of ``Times.buckets``: neighbours are 9 % apart."""
FIRST_BUCKET_S = 1e-4
"""Bucket 0 begins there, and has what is shorter too."""
NUM_BUCKETS = 212
"""The last one begins at 8,700 s, and has what is longer too."""

NUM_SUMS = 15
"""In each list of ``Side``: the upper triangle of the sum of z zT, row by row, where z is 1, then natural
logarithms: of 1 + prompt tokens that no engine held, of 1 + prompt tokens, of 1 + output tokens, and of the
time in seconds."""

BETTER, NOT_WORSE = UNTIL = "better", "not_worse"
MAX_RAMP_SHARES = 32
MAX_RAMP_S = 30 * 86_400.0
MAX_RAMP_REQUESTS = 1_000_000


class Times(msgspec.Struct, frozen=True, array_like=True):
    """Of one measure: a mean with its interval, and quantiles, can be made of it."""

    num: int = 0
    log_sum: float = 0.0
    """Of the natural logarithms of seconds."""
    log_square_sum: float = 0.0
    buckets: dict[int, int] = {}
    """Times by bucket; bucket ``i`` begins at ``FIRST_BUCKET_S`` times 2 to the power of
    ``i / BUCKETS_PER_DOUBLING``."""


class Side(msgspec.Struct, frozen=True, array_like=True):
    """What a comparison needs to know of one version: sums over its requests, see ``NUM_SUMS``."""

    num_requests: int = 0
    num_failed: int = 0
    """Requests that ended with an error, or went on without the strategy by its mistake."""
    ttft: list[float] = []
    """Empty: no request has the time."""
    tpot: list[float] = []
    jct: list[float] = []


class Score(msgspec.Struct, frozen=True, array_like=True):
    """How one version fares in one router, on all engines or on one of them, since the router's start."""

    strategy: str
    version: int
    """0: the router came with it."""
    share: str
    """``stable`` or ``canary``: as what it served them."""
    engine_id: str
    """That generated; empty: all requests of the version."""
    num_requests: int
    """That have ended."""
    failures: dict[str, int]
    """By error code."""
    num_mistakes: int
    """Requests that went on without the strategy, by its mistake."""
    num_moves: int
    """Times that a request went to another engine in its midst."""
    prompt_tokens: int
    cached_tokens: int
    received_tokens: int
    output_tokens: int
    ttft: Times
    tpot: Times
    jct: Times
    seconds: float
    """From the first of them to now."""
    side: Side | None = None
    """Of all engines together."""


class Trial(msgspec.Struct, frozen=True, array_like=True):
    """A canary and the version beside it, over the requests that came to a router since these two had these
    shares: who got which was drawn by lot."""

    strategy: str
    stable_version: int
    canary_version: int
    share: float
    """Of the canary."""
    is_sticky: bool
    """Drawn for the values of an attribute, not for each request."""
    seconds: float
    stable: Side
    canary: Side


class Ramp(msgspec.Struct, frozen=True, array_like=True):
    """How a canary gets more of the requests by itself."""

    shares: list[float]
    """One after the other, ascending; from its share on it has the next larger one. 1: it is promoted."""
    every_s: float = 0.0
    """Seconds that each share lasts at least, while all is well."""
    min_requests: int = 0
    """Requests of the canary that end with each share, at least."""
    until: str = ""
    """What is to be seen before the next share: ``better``, ``not_worse``, or empty: nothing. One that is
    seen to be worse is always taken back."""
    paused: bool = False


class RampState(msgspec.Struct, frozen=True, array_like=True):
    """How far a ramp is."""

    strategy: str
    next_share: float
    seconds: float
    """With the present share, while all was well."""
    num_requests: int
    """Of the canary that have ended with it."""
    waits_for: str
    """In words, for people."""


def fault_of_ramp(ramp: Ramp) -> str:
    """What is wrong with it, in words; empty: nothing."""
    shares = ramp.shares
    if not 0 < len(shares) <= MAX_RAMP_SHARES or any(not 0.0 < share <= 1.0 for share in shares):
        return f"a ramp has 1 to {MAX_RAMP_SHARES} shares, each above 0 and at most 1"
    if sorted(set(shares)) != shares:
        return "the shares of a ramp ascend"
    if not 0.0 <= ramp.every_s <= MAX_RAMP_S or not 0 <= ramp.min_requests <= MAX_RAMP_REQUESTS:
        return f"a share lasts 0 to {MAX_RAMP_S:.0f} s and 0 to {MAX_RAMP_REQUESTS} requests"
    if ramp.until not in ("", *UNTIL):
        return f"{ramp.until!r} is neither {BETTER} nor {NOT_WORSE}"
    if not (ramp.every_s or ramp.min_requests or ramp.until):
        return "a ramp waits for something: a time, requests, or a result"
    return ""


def bucket_of(seconds: float) -> int:
    """The number of its bucket in ``Times``."""
    if not seconds > FIRST_BUCKET_S:
        return 0
    return min(int(math.log2(seconds / FIRST_BUCKET_S) * BUCKETS_PER_DOUBLING), NUM_BUCKETS - 1)


def bucket_start_s(bucket: float) -> float:
    return float(FIRST_BUCKET_S * 2.0 ** (bucket / BUCKETS_PER_DOUBLING))
