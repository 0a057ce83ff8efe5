"""The search on a space that was once measured whole: KVServe's grid of 144, on the demo model.

``tests/data/kv_profiles.json`` says how that was measured. Scores are fidelities, ``exp(-KL)``. The model is
small and loses much by so few levels, so the floor is low: what counts is the shape.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import pytest

from microserve.services.command.profile.search.baseline import InOrder, by_lot
from microserve.services.command.profile.search.bayes import Bayes, Options
from microserve.services.command.profile.search.candidate import Candidate, Point, Search, candidates
from microserve.services.command.profile.search.front import dominates, front_of, hypervolume
from microserve.services.command.profile.space import PAPER, parameters, ways

TABLE = json.loads((Path(__file__).parents[4] / "data/kv_profiles.json").read_text())
FLOOR = 0.4
SEEDS = range(10)
MOST = 50
"""At most 35 % of 144."""


@cache
def space() -> tuple[list[Candidate], list[float]]:
    """Candidates and their scores."""
    rows = {row["name"]: row for row in TABLE["rows"]}
    every = ways(PAPER)
    assert len(every) == len(rows) == 144
    ratios = [rows[way.name]["ratio"] for way in every]
    scores = [math.exp(-rows[way.name]["kl"]) for way in every]
    return candidates([parameters(way) for way in every], ratios), scores


def run(search: Search) -> list[Point]:
    scores = space()[1]
    while (candidate := search.ask()) is not None:
        search.tell(candidate, scores[candidate.index])
    return search.points


@cache
def found(seed: int) -> tuple[list[Point], list[Point]]:
    """What was measured, and what is returned."""
    search = Bayes(space()[0], Options(floor=FLOOR, most=MOST), seed)
    return run(search), search.front()


@cache
def whole() -> float:
    return hypervolume(run(InOrder(space()[0])), FLOOR)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_third_of_the_measurements_find_the_front(seed: int) -> None:
    measured, returned = found(seed)
    assert len(measured) <= 0.35 * 144
    assert len({point.candidate.index for point in measured}) == len(measured)
    assert hypervolume(returned, FLOOR) >= 0.98 * whole()


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_that_is_returned_is_worse_than_anything_there_is(seed: int) -> None:
    every, scores = space()
    for point in found(seed)[1]:
        mine = (point.score, point.candidate.ratio)
        assert not any(dominates((scores[each.index], each.ratio), mine) for each in every)


def test_it_beats_as_many_measurements_by_lot() -> None:
    searched, drawn = [], []
    for seed in SEEDS:
        measured, returned = found(seed)
        searched.append(hypervolume(returned, FLOOR))
        drawn.append(hypervolume(run(by_lot(space()[0], len(measured), seed)), FLOOR))
    assert sum(mine > theirs for mine, theirs in zip(searched, drawn, strict=True)) >= 9
    missed = [whole() - sum(each) / len(each) for each in (searched, drawn)]
    assert missed[0] < missed[1] / 5


def test_other_prompts_say_the_same_of_what_is_returned() -> None:
    """Each was measured again on prompts that the table knows nothing of."""
    every = ways(PAPER)
    again = {row["name"]: row["kl_held_out"] for row in TABLE["rows"] if row["kl_held_out"] is not None}
    for seed in SEEDS:
        returned = found(seed)[1]
        pairs = [(p.score, math.exp(-again[every[p.candidate.index].name])) for p in returned]
        assert all(abs(one - other) < 0.06 for one, other in pairs)
        repeated = [Point(p.candidate, other) for p, (_, other) in zip(returned, pairs, strict=True)]
        assert len(front_of(repeated, FLOOR)) >= 0.6 * len(repeated)


def test_it_asks_the_same_until_it_is_told() -> None:
    search = Bayes(space()[0], Options(floor=FLOOR, most=12), seed=3)
    first = search.ask()
    assert first is not None and search.ask() is first
    assert len(run(search)) == 12
    assert search.ask() is None


def test_it_ends_early_where_nothing_is_to_be_gained() -> None:
    every = space()[0]
    search = Bayes(every, Options(floor=0.5, most=144), seed=0)
    while (candidate := search.ask()) is not None:
        search.tell(candidate, 0.1)  # nothing is of any use
    assert len(search.points) < 72
    assert search.front() == []


def test_a_space_of_one() -> None:
    [one] = candidates([{"levels": 8.0}], [3.0])
    search = Bayes([one], Options(floor=0.5, most=5), seed=0)
    assert search.ask() == one
    search.tell(one, 0.7)
    assert search.ask() is None
    assert search.front() == [Point(one, 0.7)]
