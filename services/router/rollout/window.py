"""How one version of a strategy fares: its last requests, their failures and times. Sans-I/O.

Decides when a version is given up; control.py acts. Times are only compared with those of the version that
serves the other requests at the same time (what load does to both is not held against one), or with bounds
that its publisher gave it.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import NamedTuple

WINDOW_S = 10.0
MAX_ENDS = 2000
"""Requests remembered at most."""
MIN_ERRORS = 3
MAX_ERROR_SHARE = 0.1
"""A version with so many failed requests in the window, and more than this share of them, is given up."""
MIN_TIMED = 30
SLOW_FACTOR, SLOW_MARGIN_S = 2.0, 0.02
"""A canary with so many requests whose median TTFT or TPOT is above this times the stable version's, and by
more than the margin (of TPOT: a tenth of it), is given up. Coarse, since prompts differ in length."""


class End(NamedTuple):
    """One request of the version."""

    at: float
    """Seconds, by any one monotonic clock."""
    failed: bool
    """By the strategy's fault."""
    ttft_s: float | None = None
    tpot_s: float | None = None
    """Of one output token after the first; None where it is not known."""
    slow: bool = False
    """It held the router for longer than it may."""


class Bounds(NamedTuple):
    """What its publisher allows a version; 0: anything."""

    ttft_s: float = 0.0
    tpot_s: float = 0.0


class VersionWindow:
    def __init__(self) -> None:
        self._ends: deque[End] = deque()
        self._num_failed = 0
        self._num_slow = 0

    def add(self, end: End) -> None:
        self._ends.append(end)
        self._num_failed += end.failed
        self._num_slow += end.slow
        while end.at - self._ends[0].at > WINDOW_S or len(self._ends) > MAX_ENDS:
            old = self._ends.popleft()
            self._num_failed -= old.failed
            self._num_slow -= old.slow

    def too_many_errors(self) -> str:
        """Why the version is to be given up; empty if it is not."""
        num_ends = len(self._ends)
        for num, what in (
            (self._num_failed, "failed by its fault"),
            (self._num_slow, "held the router for longer than it may"),
        ):
            if num >= MIN_ERRORS and num > MAX_ERROR_SHARE * num_ends:
                return (
                    f"{num} of {num_ends} requests {what} within {WINDOW_S:g} s, "
                    f"the bound is {MAX_ERROR_SHARE:.0%}"
                )
        return ""

    def over(self, bounds: Bounds) -> str:
        """Why the version is to be given up by its publisher's own bounds; empty if it is not."""
        for name, times, bound_s in (
            ("TTFT", self._ttfts(), bounds.ttft_s),
            ("TPOT", self._tpots(), bounds.tpot_s),
        ):
            if bound_s > 0.0 and len(times) >= MIN_TIMED:
                found_s = statistics.quantiles(times, n=10)[-1]
                if found_s > bound_s:
                    return f"90 % of {name} within {found_s:.4f} s, the bound is {bound_s:g} s"
        return ""

    def slower_than(self, stable: VersionWindow) -> str:
        """Why a canary is to be given up beside ``stable``; empty if it is not."""
        for name, ours, theirs, margin_s in (
            ("TTFT", self._ttfts(), stable._ttfts(), SLOW_MARGIN_S),
            ("TPOT", self._tpots(), stable._tpots(), SLOW_MARGIN_S / 10),
        ):
            if min(len(ours), len(theirs)) < MIN_TIMED:
                continue
            mine, other = statistics.median(ours), statistics.median(theirs)
            if mine > SLOW_FACTOR * other and mine > other + margin_s:
                return f"median {name} {mine:.4f} s, of the stable version {other:.4f} s"
        return ""

    def _ttfts(self) -> list[float]:
        return [end.ttft_s for end in self._ends if end.ttft_s is not None]

    def _tpots(self) -> list[float]:
        return [end.tpot_s for end in self._ends if end.tpot_s is not None]
