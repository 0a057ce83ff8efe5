"""Scores: stretched, weighed, drawn. What ``pick`` makes of reasons in different units."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.errors import StrategyError
from microserve.protocol.messages.engine import EngineLoad
from microserve.services.router.authoring import choice, scorer
from microserve.services.router.authoring.action.engine import Engine
from microserve.services.router.authoring.mesh import Mesh, Scorer
from microserve.services.router.engines.load import LoadBook
from microserve.services.router.request.request import Request
from tests.support.router.paper_mesh import PaperEngine, by_id, paper_mesh, sent

finite = st.floats(allow_nan=False, allow_infinity=False)
scores = st.lists(finite, min_size=1, max_size=6)


@given(scores)
def test_stretched_scores_lie_in_0_to_1_and_keep_their_order(values: list[float]) -> None:
    shares = choice.normalised(values)
    assert all(0.0 <= share <= 1.0 for share in shares)
    for a, x in zip(values, shares, strict=True):
        for b, y in zip(values, shares, strict=True):
            assert (a < b) <= (x <= y)
    if max(values) / 2 - min(values) / 2 > 0:
        assert (min(shares), max(shares)) == (0.0, 1.0)
    else:
        assert set(shares) == {0.0}


@given(scores, st.integers(0, 5))
def test_an_unknown_that_counts_as_the_best_changes_nothing_for_the_others(
    values: list[float], where: int
) -> None:
    where = min(where, len(values))
    shares = choice.normalised([*values[:where], math.inf, *values[where:]])
    assert shares.pop(where) == max(shares)
    assert shares == choice.normalised(values)


@given(scores, st.floats(1e-300, 1e300), st.integers(0, 1 << 30))
def test_a_draw_is_one_of_them_at_every_temperature(values: list[float], t: float, seed: int) -> None:
    assert 0 <= choice.softmax_choice(values, t, random.Random(seed)) < len(values)


def test_temperature_has_no_unit_and_says_how_much_the_best_is_preferred() -> None:
    for unit in (1e-6, 1.0, 1e9):
        rng = random.Random(1)
        drawn = Counter(choice.softmax_choice([0.0, unit], 1.0, rng) for _ in range(20_000))
        assert drawn[1] / drawn[0] == pytest.approx(math.e, rel=0.06)
        assert {choice.softmax_choice([0.0, unit], 1e-3, rng) for _ in range(100)} == {1}
    even = Counter(choice.softmax_choice([5.0, 5.0], 1e-3, random.Random(1)) for _ in range(2000))
    assert min(even.values()) > 900


A = PaperEngine("a", EngineLoad(queued_prefill_tokens=1000, num_running=1), labels=["near"])
B = PaperEngine("b", EngineLoad(queued_prefill_tokens=500, num_running=9), labels=["far"])
C = PaperEngine("c", EngineLoad(queued_prefill_tokens=0, num_running=9), labels=["far"])


def test_weights_decide_between_reasons_of_any_unit() -> None:
    with paper_mesh(A, B, C, held={"a": 96, "b": 48}) as (mesh, request):
        load, match = scorer.load, scorer.prefix_match

        def picked(scorers: dict[Scorer, float]) -> str:
            return mesh.pick(None, request, scorers=scorers).id

        assert picked({load: 1.0}) == "c"
        assert picked({match: 1.0}) == "a"
        assert picked({load: 1.0, match: 1.1}) == "a"
        assert picked({load: 1.1, match: 1.0}) == "c"
        assert picked({load: -1.0}) == "a"
        assert picked({scorer.sequences: 1.0}) == "a"
        assert picked({scorer.labelled("near"): 1.0, load: 0.9}) == "a"
        assert picked({scorer.labelled("nowhere"): 5.0, load: 0.1}) == "c"
        assert picked({}) == "c"  # nothing but the load that decides between equals


def test_a_scorer_of_ones_own() -> None:
    def alphabet(mesh: Mesh, engine: Engine, request: Request) -> float:
        return -ord(engine.id) * request.num_tokens

    with paper_mesh(A, B, C) as (mesh, request):
        assert mesh.pick(None, request, scorers={alphabet: 1.0}, exclude=[by_id(mesh)["a"]]).id == "b"


def test_links_are_scored_by_goodput_and_an_unknown_one_is_tried() -> None:
    book = LoadBook()
    book.links.measure("a", "c", sent(10, nbytes=1000, transfer_s=1.0))
    with paper_mesh(A, B, C, book=book) as (mesh, request):
        c = by_id(mesh)["c"]
        assert mesh.pick(None, request, exclude=[c], scorers={scorer.link_to(c): 1.0}).id == "b"
        book.links.measure("b", "c", sent(10, nbytes=1000, transfer_s=2.0))
        assert mesh.pick(None, request, exclude=[c], scorers={scorer.link_to(c): 1.0}).id == "a"
        book.links.measure("c", "b", sent(10, nbytes=1000, transfer_s=1.0))
        book.links.measure("c", "a", sent(10, nbytes=1000, transfer_s=2.0))
        assert mesh.pick(None, request, exclude=[c], scorers={scorer.link_from(c): 1.0}).id == "b"


def test_temperature_spreads_what_would_all_go_to_one() -> None:
    with paper_mesh(A, B, C) as (mesh, request):
        best = Counter(mesh.pick(None, request, scorers={scorer.load: 1.0}).id for _ in range(50))
        spread = Counter(
            mesh.pick(None, request, scorers={scorer.load: 1.0}, temperature=1.0).id for _ in range(3000)
        )
        by_cost = Counter(
            mesh.pick(None, request, cost=lambda e: mesh.load(e).uncached_tokens, temperature=1.0).id
            for _ in range(3000)
        )
    assert best == {"c": 50}
    for drawn in (spread, by_cost):
        assert drawn["c"] > drawn["b"] > drawn["a"] > 300


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"scorers": {lambda m, e, r: math.nan: 1.0}}, "nan"),
        ({"scorers": {lambda m, e, r: -math.inf: 1.0}}, "-inf"),
        ({"scorers": {scorer.load: math.nan}}, "weight nan"),
        ({"scorers": {scorer.load: 1.0}, "cost": lambda e: 0.0}, "not both"),
        ({"temperature": -1.0}, "below 0"),
        ({"temperature": math.nan}, "below 0"),
        ({"cost": lambda e: math.inf, "temperature": 1.0}, "not finite"),
    ],
)
def test_what_is_no_score_is_the_authors_error(fields: dict[str, object], text: str) -> None:
    with paper_mesh(A, B) as (mesh, request), pytest.raises(StrategyError, match=text):
        mesh.pick(None, request, **fields)  # type: ignore[arg-type]
