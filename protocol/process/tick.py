"""When a process does what it does every interval: at the same moments as everybody else on the machine.

A wake-up costs more than what is done in it. Ticks fall on multiples of the interval of the machine's
monotonic clock, so a process wakes once for all its timers, and what its neighbours send it comes while it
is awake. Owns that arithmetic; knows nobody who ticks.
"""

from __future__ import annotations

import asyncio

NEAREST = 0.25
"""Of an interval: a tick that is so near is left out, for timers are not exact."""


def until_tick(now: float, interval_s: float) -> float:
    """Seconds to the next tick: more than a quarter of the interval, and at most a quarter more than it."""
    left_s = interval_s - now % interval_s
    return left_s if left_s > interval_s * NEAREST else left_s + interval_s


def at_rest(interval_s: float, liveness: int) -> float:
    """Between two signs of life of who has nothing new to say: every other interval, where that leaves three
    of them in the time after which who is silent is lost."""
    return interval_s * (2 if liveness >= 6 else 1)


def between_signs(interval_s: float, liveness: int) -> float:
    """Between two signs of life that say nothing else: as long as leaves three of them in that time."""
    return interval_s * max(1, liveness // 3)


async def tick(interval_s: float) -> None:
    """Sleep until then."""
    await asyncio.sleep(until_tick(asyncio.get_running_loop().time(), interval_s))
