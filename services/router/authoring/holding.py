"""Requests that a strategy lets wait on purpose: by rank, then by age, under a bound.

Owns who is next. The one that is asks its own condition every ``LOOK_S``, in its own task (a condition is the
author's code, and bounded as such); all others sleep. What it does before its next ``await`` is booked before
anybody else looks, so two never go by one free place. Knows no engines.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from microserve.protocol.errors import QueueFull, StrategyError
from microserve.services.router.request.scope import RequestScope

LOOK_S = 0.01
RETRY_AFTER_S = 1.0


class _Place(NamedTuple):
    """In order: the highest rank first, then the oldest."""

    rank: float
    number: int
    is_next: asyncio.Event


class Queues:
    """The requests that one strategy holds in one router, by queue; empty ones are forgotten."""

    def __init__(self) -> None:
        self._queues: dict[str, Queue] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    async def wait(
        self,
        scope: RequestScope,
        until: Callable[[], bool],
        *,
        queue: str,
        rank: float,
        most: int,
        max_s: float | None,
    ) -> None:
        """As :meth:`Queue.wait`."""
        held = self._queues.setdefault(queue, Queue())
        try:
            await held.wait(scope, until, rank=rank, most=most, max_s=max_s)
        finally:
            if not held and self._queues.get(queue) is held:
                del self._queues[queue]


@dataclass(slots=True)
class Queue:
    """Requests that wait for each other."""

    _places: list[_Place] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def __len__(self) -> int:
        return len(self._places)

    async def wait(
        self, scope: RequestScope, until: Callable[[], bool], *, rank: float, most: int, max_s: float | None
    ) -> None:
        """Return when it is this one's turn and ``until()`` is true. Raises ``QueueFull`` when ``most`` wait
        already, or after ``max_s``; :class:`StrategyError` for a rank that is none."""
        if math.isnan(rank):
            raise StrategyError("a rank is a number, not NaN")
        if not self._places and until():
            return
        if len(self._places) >= most:
            raise QueueFull(f"{len(self._places)} requests are held already", retry_after_s=RETRY_AFTER_S)
        place = _Place(-rank, next(self._numbers), asyncio.Event())
        insort(self._places, place)
        limit = asyncio.timeout(max_s)
        try:
            async with limit:
                with scope.engaged():
                    await self._turn(place, until)
        except TimeoutError:
            if not limit.expired():
                raise
            raise QueueFull(f"held for {max_s:g} s", retry_after_s=RETRY_AFTER_S) from None
        finally:
            self._places.remove(place)
            if self._places:
                self._places[0].is_next.set()

    async def _turn(self, place: _Place, until: Callable[[], bool]) -> None:
        while True:
            if self._places[0] is not place:
                place.is_next.clear()
                await place.is_next.wait()
            elif until():
                return
            else:
                await asyncio.sleep(LOOK_S)
