"""Fronts and the area under them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from microserve.services.command.profile.search.candidate import Candidate, Point, candidates
from microserve.services.command.profile.search.front import dominates, front_of, hypervolume, pareto

VALUES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), max_size=12)


def points(*pairs: tuple[float, float]) -> list[Point]:
    """Of scores and ratios."""
    return [Point(Candidate(index, (), ratio), score) for index, (score, ratio) in enumerate(pairs)]


@given(VALUES)
def test_a_front_is_what_nobody_dominates_and_dominates_all_others(values: list[tuple[int, ...]]) -> None:
    kept = set(pareto(values))
    for index, each in enumerate(values):
        better = [other for other in kept if dominates(values[other], each)]
        assert bool(better) is (index not in kept)


def test_the_area_is_that_of_a_staircase() -> None:
    stairs = points((0.5, 5.0), (0.8, 3.0), (0.7, 2.0), (0.9, 2.0), (0.2, 9.0))
    assert [point.score for point in front_of(stairs, 0.4)] == [0.5, 0.8, 0.9]
    assert hypervolume(stairs, 0.4) == (0.5 - 0.4) * 4 + (0.8 - 0.5) * 2 + (0.9 - 0.8) * 1


def test_what_is_below_the_floor_or_no_smaller_counts_for_nothing() -> None:
    assert hypervolume(points((0.3, 9.0), (1.0, 0.9)), 0.5) == 0.0
    assert hypervolume([], 0.5) == 0.0


def test_words_become_places_and_numbers_parts_of_their_range() -> None:
    rows: list[dict[str, str | float]] = [
        {"kind": "head", "levels": 8.0, "same": 1.0},
        {"kind": "layer", "levels": 16.0, "same": 1.0},
        {"kind": "head", "levels": 10.0, "same": 1.0},
    ]
    places = [each.features for each in candidates(rows, [1.0, 2.0, 3.0])]
    assert places == [(1.0, 0.0, 0.0), (0.0, 1.0, 1.0), (1.0, 0.0, 0.25)]
