"""Whether this process has run all the while, or its clock has jumped: sans-I/O.

A router that was stopped (a frozen machine, a debugger) finds every request that was live late by as much;
that says nothing of the strategies that served them.
"""

from __future__ import annotations

import math

MIN_GAP_S = 5.0
"""What strategies' code holds a router for is shorter: it is broken off long before."""


class Pulse:
    def __init__(self) -> None:
        self._max_gap_s = MIN_GAP_S
        self._last: float | None = None
        self._resumed_at = -math.inf

    def beat(self, now: float, next_s: float) -> None:
        """Regularly. ``now``: seconds, by the clock that is to be trusted; ``next_s``: to the next beat."""
        self._look(now)
        self._max_gap_s = max(MIN_GAP_S, 3 * next_s)

    def _look(self, now: float) -> None:
        if self._last is not None and not 0.0 <= now - self._last <= self._max_gap_s:
            self._resumed_at = now
        self._last = now

    def has_run_since(self, then: float, now: float) -> bool:
        """What began at ``then`` and ends now took as long as it seems. True before the first beat."""
        if self._last is not None:
            self._look(now)
        return self._resumed_at <= then <= now
