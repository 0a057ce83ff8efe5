"""How one version of a strategy fares: its last requests, their failures and times. Sans-I/O.

Decides when a version is given up; control.py acts. Counts as much as seconds: what comes ten times a minute
is judged by its last requests, however old, and what comes a hundred times a second by the last seconds.
Times are only compared with those of the version that serves the other requests at the same time (what load
does to both is not held against one), or with bounds that its publisher gave it.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

WINDOW_S = 10.0
MIN_TIMED = 30
"""So many of the newest requests count, also those that are older than the window."""
MAX_ENDS = 2000
"""Requests remembered at most."""
MIN_ERRORS = 3
MAX_ERROR_SHARE = 0.1
"""A version with so many failed requests of those that count, and more than this share of them, is given
up."""
MIN_FAR_OVER = 10
"""With so many times and fewer than ``MIN_TIMED`` it is given up when most of them are over its bound."""
SLOW_FACTOR, SLOW_MARGIN_S = 2.0, 0.02
"""A canary with ``MIN_TIMED`` requests whose median TTFT or TPOT is above this times the stable version's,
and by more than the margin (of TPOT: a tenth of it), is given up if that is beyond chance. Coarse, since
prompts differ in length."""
MIN_RANK_Z = 4.0
"""Beyond chance, at any of some thousand looks: by the ranks of the times, in standard deviations. Where half
of the prompts are long, medians of equals differ by more than ``SLOW_FACTOR`` all the time."""
LOOKS = 32
"""Among many times a few new ones change no median: they are looked at after every ``LOOKS``th part of
them."""


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


class _Times:
    """Of one measure, the newest last."""

    def __init__(self) -> None:
        self._times: deque[tuple[float, float]] = deque(maxlen=MAX_ENDS)
        """When, and what."""

    def __len__(self) -> int:
        return len(self._times)

    def add(self, at: float, seconds: float) -> None:
        self._times.append((at, seconds))

    def counting(self) -> tuple[list[float], float]:
        """Those within the window, ``MIN_TIMED`` at least; and when the oldest of them was."""
        return self.since(self._times[-1][0] - WINDOW_S if self._times else 0.0)

    def since(self, at: float) -> tuple[list[float], float]:
        """Those that are no older, ``MIN_TIMED`` at least."""
        found: list[float] = []
        oldest = at
        for then, seconds in reversed(self._times):
            if len(found) >= MIN_TIMED and then < at:
                break
            found.append(seconds)
            oldest = then
        return found, oldest


class VersionWindow:
    def __init__(self) -> None:
        self._ends: deque[End] = deque()
        self._num_failed = 0
        self._num_slow = 0
        self._ttfts, self._tpots = _Times(), _Times()
        self._num_unseen = 0

    def add(self, end: End) -> None:
        self._ends.append(end)
        self._num_failed += end.failed
        self._num_slow += end.slow
        while len(self._ends) > MAX_ENDS or (
            len(self._ends) > MIN_TIMED and end.at - self._ends[0].at > WINDOW_S
        ):
            old = self._ends.popleft()
            self._num_failed -= old.failed
            self._num_slow -= old.slow
        if end.ttft_s is not None:
            self._ttfts.add(end.at, end.ttft_s)
            self._num_unseen += 1
        if end.tpot_s is not None:
            self._tpots.add(end.at, end.tpot_s)

    def too_many_errors(self) -> str:
        """Why the version is to be given up; empty if it is not."""
        num_ends = len(self._ends)
        for num, what in (
            (self._num_failed, "failed by its fault"),
            (self._num_slow, "held the router for longer than it may"),
        ):
            if num >= MIN_ERRORS and num > MAX_ERROR_SHARE * num_ends:
                return f"{num} of its last {num_ends} requests {what}, the bound is {MAX_ERROR_SHARE:.0%}"
        return ""

    def is_due(self) -> bool:
        """Enough has come since this was last true for the times to be looked at."""
        if not self._num_unseen or self._num_unseen * LOOKS < len(self._ttfts):
            return False
        self._num_unseen = 0
        return True

    def over(self, bounds: Bounds) -> str:
        """Why the version is to be given up by its publisher's own bounds; empty if it is not."""
        for name, times, bound_s in (
            ("TTFT", self._ttfts, bounds.ttft_s),
            ("TPOT", self._tpots, bounds.tpot_s),
        ):
            if bound_s <= 0.0 or len(times) < MIN_FAR_OVER:
                continue
            found, _ = times.counting()
            if len(found) < MIN_TIMED:
                if (median_s := statistics.median(found)) > bound_s:
                    return f"half of {len(found)} {name} over {median_s:.4f} s, the bound is {bound_s:g} s"
            elif (most_s := statistics.quantiles(found, n=10)[-1]) > bound_s:
                return f"90 % of {name} within {most_s:.4f} s, the bound is {bound_s:g} s"
        return ""

    def slower_than(self, stable: VersionWindow) -> str:
        """Why a canary is to be given up beside ``stable``; empty if it is not. Of the other one those times
        count that are no older than the oldest of the canary's that does."""
        for name, ours, theirs, margin_s in (
            ("TTFT", self._ttfts, stable._ttfts, SLOW_MARGIN_S),
            ("TPOT", self._tpots, stable._tpots, SLOW_MARGIN_S / 10),
        ):
            if min(len(ours), len(theirs)) < MIN_TIMED:
                continue
            found, oldest = ours.counting()
            others, _ = theirs.since(oldest)
            mine, other = statistics.median(found), statistics.median(others)
            is_slow = mine > SLOW_FACTOR * other and mine > other + margin_s
            if is_slow and _rank_z(found, others) > MIN_RANK_Z:
                return f"median {name} {mine:.4f} s, of the stable version {other:.4f} s"
        return ""


def _rank_z(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """By how much ours are the greater ones, in deviations of what chance does (Mann and Whitney)."""
    num, num_theirs, ordered = len(ours), len(theirs), sorted(theirs)
    above = sum(bisect_left(ordered, each) + bisect_right(ordered, each) for each in ours) / 2
    pairs = num * num_theirs
    return (above - pairs / 2) / math.sqrt(pairs * (num + num_theirs + 1) / 12)
