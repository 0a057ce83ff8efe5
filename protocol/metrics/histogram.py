"""Counts of numbers by fixed bounds, as Prometheus wants them. One thread observes: nothing is locked."""

from __future__ import annotations

from bisect import bisect_left


class Histogram:
    """prometheus_client's own has a lock for each number, and costs a token more than all of its text."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """``bounds``: upper ones, ascending."""
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Of each bound what is at most that and above the one before; last, what is above all."""
        self.total = 0.0
        """Of all numbers."""

    def observe(self, number: float) -> None:
        self.counts[bisect_left(self.bounds, number)] += 1
        self.total += number

    def copy(self) -> Histogram:
        """As it is now."""
        made = Histogram.__new__(Histogram)
        made.bounds, made.counts, made.total = self.bounds, self.counts.copy(), self.total
        return made
