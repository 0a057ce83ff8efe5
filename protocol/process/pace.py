"""How soon a process says again that it is here: soon while anything is under way, else seldom.

Owns when a process is idle and what wakes it. Whoever sleeps by :meth:`Pace.tick` between two signs of life
says in each how long that is (``next_s``, WIRE.md 3.5), and is woken by :meth:`Pace.stir`. Must not know whom
the signs are for, nor what they say beside.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Final

from microserve.protocol.bus.peers import MAX_NEXT_S
from microserve.protocol.process.tick import between_signs, until_tick

IDLE_INTERVALS: Final = 8
"""Of heartbeats, between two signs of life of who is idle."""
MIN_LIVENESS: Final = 6
"""With fewer intervals to a loss nobody is idle."""
CALM_SILENCES: Final = 2
"""So many times the silence that is allowed must nothing have happened before a process is idle: who asks now
and then shall not have it woken each time."""


def idle_interval(interval_s: float, liveness: int) -> float:
    """Seconds between two signs of life of who is idle, no more than is believed; 0 where nobody is: others
    may be as rare."""
    idle_s = min(interval_s * IDLE_INTERVALS, MAX_NEXT_S)
    is_longer = idle_s > between_signs(interval_s, liveness)
    return idle_s if liveness >= MIN_LIVENESS and is_longer else 0.0


class Pace:
    """One for all timers of a process. Make it inside the running loop."""

    def __init__(
        self, interval_s: float, liveness: int, is_busy: Callable[[], bool], *, calm_s: float | None = None
    ) -> None:
        """``is_busy``: something is under way. ``calm_s``: without anything, before the process is idle;
        None: ``CALM_SILENCES``."""
        self.idle_s = idle_interval(interval_s, liveness)
        """Between two signs of life while idle; 0: this process never is."""
        self._calm_s = CALM_SILENCES * interval_s * liveness if calm_s is None else calm_s
        self._is_busy = is_busy
        self._loop = asyncio.get_running_loop()
        self._stirred_at = self._loop.time()
        self._decided_at, self._next_s = -math.inf, 0.0
        self._asleep: dict[asyncio.Event, None] = {}
        """Of those who sleep for long, in the order in which they fell asleep."""

    @property
    def next_s(self) -> float:
        """To be said in a sign of life, and slept after it; 0: not idle."""
        now = self._loop.time()
        if self.idle_s and now != self._decided_at:  # of a thousand timers at one moment one asks who is busy
            self._decided_at = now
            is_busy = self._is_busy()
            if is_busy:
                self._stirred_at = now
            is_calm = not is_busy and now - self._stirred_at >= self._calm_s
            self._next_s = self.idle_s if is_calm else 0.0
        return self._next_s

    def stir(self) -> None:
        """Something has begun, or has happened: whoever sleeps for long wakes up."""
        self._stirred_at = self._loop.time()
        self._decided_at = -math.inf
        if self._asleep:
            asleep, self._asleep = self._asleep, {}
            for news in asleep:
                news.set()

    async def tick(
        self,
        next_s: float,
        awake_s: float,
        news: asyncio.Event | None = None,
        *,
        at_most_s: float = math.inf,
    ) -> None:
        """Sleep until the tick after a sign that said ``next_s`` (``awake_s``: the interval if that is 0), or
        until ``news``, or for ``at_most_s``. A long sleep also ends by :meth:`stir`, which sets ``news``."""
        left_s = until_tick(self._loop.time(), next_s or awake_s)
        if news is None:
            if not next_s:
                await asyncio.sleep(left_s)
                return
            news = asyncio.Event()
        if next_s:
            self._asleep[news] = None
        try:
            async with asyncio.timeout(min(left_s, at_most_s)):
                await news.wait()
        except TimeoutError:
            pass
        finally:
            self._asleep.pop(news, None)
