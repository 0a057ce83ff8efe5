"""By how much transfers took longer than predicted, remembered relative to the prediction.

A residual in seconds would mix transfers of all sizes. Kept for each cell (what may be chosen from, and whose
interval of the envelope it is) and profile; 0 is where everything starts, so a profile that nobody tried is
believed as it was measured.
"""

from __future__ import annotations

import math
from collections import OrderedDict

Cell = tuple[frozenset[int], str]

MAX_RESIDUAL = 8.0
"""One transfer that hung counts as at most nine times as long as predicted: it must be possible to live
down."""
MAX_CELLS = 4096


class Residuals:
    """Exponentially weighted means, the newest counting ``weight``; the longest unused go first."""

    def __init__(self, weight: float) -> None:
        self._weight = weight
        self._means: OrderedDict[tuple[Cell, str], float] = OrderedDict()

    def of(self, cell: Cell, name: str) -> float:
        """More than -1. So much of the prediction is to be added to it."""
        return self._means.get((cell, name), 0.0)

    def saw(self, cell: Cell, name: str, predicted_s: float, observed_s: float) -> None:
        """``predicted_s`` is positive."""
        sample = min((observed_s - predicted_s) / predicted_s, MAX_RESIDUAL)
        mean = self._means.pop((cell, name), 0.0)
        self._means[cell, name] = mean + self._weight * (sample - mean)
        if len(self._means) > MAX_CELLS:
            self._means.popitem(last=False)

    def check_integrity(self) -> None:
        """Raises AssertionError."""
        assert len(self._means) <= MAX_CELLS
        for (_, name), mean in self._means.items():
            assert math.isfinite(mean) and -1.0 <= mean <= MAX_RESIDUAL, f"{name}: residual {mean}"
