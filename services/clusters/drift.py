"""Have prompts another length than those that a plan was made from?

Of *all* prompts, wherever they are computed: a sample of those that went across alone begins at the threshold
that it is to move. Lengths are counted in buckets of half an octave; half of what was counted is forgotten
each time the window is full.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

PER_OCTAVE = 2
WINDOW = 512
FEWEST = 128
"""Two samples of fewer differ by chance alone by as much as is asked for."""
SHIFT = 0.2


class LengthDrift:
    """What came of late, and what the last plan was made from."""

    def __init__(self, *, window: int = WINDOW, fewest: int = FEWEST, shift: float = SHIFT) -> None:
        self._window, self._fewest, self._shift = window, fewest, shift
        self._counts: dict[int, float] = {}
        self._total = 0.0
        self._planned: dict[int, float] = {}
        """Shares, of the last plan; empty before the first."""

    def add(self, num_tokens: int) -> None:
        """A prompt of which ``num_tokens`` >= 0 are in no cache."""
        bucket = math.ceil(PER_OCTAVE * math.log2(max(num_tokens, 1)))
        self._counts[bucket] = self._counts.get(bucket, 0.0) + 1.0
        self._total += 1.0
        if self._total >= self._window:
            self._counts = {each: count / 2 for each, count in self._counts.items() if count >= 0.25}
            self._total = sum(self._counts.values())

    @property
    def distance(self) -> float:
        """Share of prompts that would have to have another length: 0 alike, 1 nothing in common."""
        return _distance(self._shares(), self._planned)

    @property
    def is_due(self) -> bool:
        """A plan is to be made: there is none yet, or lengths have gone elsewhere."""
        return self._total >= self._fewest and (not self._planned or self.distance >= self._shift)

    def take(self) -> list[tuple[float, float]]:
        """Upper end and count of each bucket with anything in it or next to such, for a plan that is made of
        them now."""
        self._planned = self._shares()
        buckets = range(min(self._counts) - 1, max(self._counts) + 1)
        return [(2 ** (each / PER_OCTAVE), self._counts.get(each, 0.0)) for each in buckets]

    def _shares(self) -> dict[int, float]:
        return {each: count / self._total for each, count in self._counts.items()}


def _distance(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    return sum(abs(one.get(each, 0.0) - other.get(each, 0.0)) for each in {*one, *other}) / 2
