"""A figure with the interval in which the true one lies in 95 of 100 cases."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""By degrees of freedom, from one on; the last for all beyond."""


def median_of(values: Sequence[float]) -> list[float]:
    """With the interval in which the true one lies in 95 of 100 cases, by ranks."""
    ranked = sorted(values)
    cut = max(0, math.floor(len(ranked) / 2 - 0.98 * math.sqrt(len(ranked))))
    return [round(each, 4) for each in (statistics.median(ranked), ranked[cut], ranked[-1 - cut])]


def mean_of(values: Sequence[float]) -> list[float]:
    """With its interval, 95 %, by Student's t."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return [round(mean, 4), -math.inf, math.inf]
    student = STUDENT[min(len(values) - 2, len(STUDENT) - 1)]
    half = student * statistics.stdev(values) / math.sqrt(len(values))
    return [round(each, 4) for each in (mean, mean - half, mean + half)]
