"""Rows of a table of measurements: what, measured, against which ceiling, its share, the goal, and whether it
was met. Owns their form. Must not know what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Unit = Literal["%", "x", "layers", "launches"]


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound for a row's ``share``. ``unit``: ``%`` for parts of one, ``x`` for times as fast, ``layers``
    for times of one layer, ``launches`` for a count."""

    relation: Literal[">=", "<="]
    bound: float
    unit: Unit

    def is_met(self, share: float) -> bool:
        """What could not be measured has not been met."""
        if math.isnan(share):
            return False
        return share >= self.bound if self.relation == ">=" else share <= self.bound

    def __str__(self) -> str:
        return f"{self.relation} {in_unit(self.bound, self.unit)}"


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    amount: int
    """Of bytes or operations that the time was spent on."""
    amount_unit: Literal["B", "FLOP"]
    measured: str
    ceiling: str = ""
    share: float = math.nan
    goal: Goal | None = None


_WIDTHS = (48, 11, 12, 20, 11, 14)


def head() -> str:
    return _line(("what", "work", "measured", "ceiling", "share", "goal", ""))


def line(row: Row, *, is_judged: bool = True) -> str:
    """Unless ``is_judged`` it is not said whether the goal was met."""
    share = goal = verdict = ""
    if row.goal is not None:
        share, goal = in_unit(row.share, row.goal.unit), str(row.goal)
        verdict = "-" if not is_judged else "met" if row.goal.is_met(row.share) else "missed"
    work = counted(row.amount, row.amount_unit)
    return _line((row.what, work, row.measured, row.ceiling, share, goal, verdict))


def _line(cells: tuple[str, ...]) -> str:
    return " ".join([*map(str.ljust, cells, _WIDTHS), cells[-1]]).rstrip()  # the last one needs no width


def summary(rows: Iterable[Row]) -> str:
    goals = [(row, row.goal) for row in rows if row.goal is not None]
    missed = [row.what for row, goal in goals if not goal.is_met(row.share)]
    said = f"{len(goals) - len(missed)} of {len(goals)} goals met"
    return f"{said}; missed: {'; '.join(missed)}" if missed else said


def in_unit(value: float, unit: Unit) -> str:
    if unit == "%":
        return f"{value * 100:.1f} %"
    if unit == "layers":
        return f"{value:.2f} layers"
    return f"{value:.0f} launches" if unit == "launches" else f"{value:.1f} {unit}"


def counted(count: float, unit: str) -> str:
    """``15.0 GB``: decimal, with three digits."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if count < 999.5 or prefix == "P":
            break
        count /= 1000
    return f"{count:.3g} {prefix}{unit}"


def spent(elapsed_s: float) -> str:
    return f"{elapsed_s * 1e3:.3f} ms" if elapsed_s < 1.0 else f"{elapsed_s:.3f} s"
