"""Many measurements as three figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises :class:`statistics.StatisticsError` where there are none."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.least)}-{number(self.most)})"

    def as_json(self) -> list[float]:
        """[median, least, most], to four digits."""
        return [float(f"{value:.4g}") for value in asdict(self).values()]


def number(value: float) -> str:
    """To three digits, and no digit of whole ones is lost."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ratios(
    above: Sequence[float], below: Sequence[float], pick: Callable[[Sequence[float]], Spread] = Spread.of
) -> Spread:
    """Round by round: both sides of each ratio were measured one right after the other."""
    return pick([a / b for a, b in zip(above, below, strict=True)])


def of_median(values: Sequence[float]) -> Spread:
    """The median, and an interval in which the true one lies in 95 of 100 cases, by the ranks of the values;
    of few all of them. Raises :class:`statistics.StatisticsError` where there are none."""
    ranked = sorted(values)
    cut = max(0, math.floor(len(ranked) / 2 - 0.98 * math.sqrt(len(ranked))))
    return Spread(statistics.median(ranked), ranked[cut], ranked[-1 - cut])


def differences(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Pair by pair, as :func:`of_median`: both sides of each were measured one right after the other."""
    return of_median([a - b for a, b in zip(above, below, strict=True)])
