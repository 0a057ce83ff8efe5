"""Points that no other one is better than, and what they are worth together. Larger is better in all."""

from __future__ import annotations

from collections.abc import Sequence

from microserve.services.command.profile.search.candidate import Point

Values = tuple[float, ...]


def dominates(one: Values, other: Values) -> bool:
    """At least as good in all and better in one."""
    return one != other and all(mine >= theirs for mine, theirs in zip(one, other, strict=True))


def pareto(values: Sequence[Values]) -> list[int]:
    """Indices of those that no other one dominates, in order; of equal ones all."""
    return [index for index, each in enumerate(values) if not any(dominates(other, each) for other in values)]


def front_of(points: Sequence[Point], floor: float) -> list[Point]:
    """By score and ratio, of those whose score is at least ``floor``; from the largest ratio on."""
    feasible = [point for point in points if point.score >= floor]
    kept = pareto([(point.score, point.candidate.ratio) for point in feasible])
    return sorted((feasible[index] for index in kept), key=lambda point: -point.candidate.ratio)


def hypervolume(points: Sequence[Point], floor: float) -> float:
    """The area between (``floor``, 1: no smaller at all) and what the points reach in score and ratio."""
    area, reached = 0.0, floor
    for point in front_of(points, floor):
        if point.candidate.ratio > 1:
            area += (point.score - reached) * (point.candidate.ratio - 1)
            reached = point.score
    return area
