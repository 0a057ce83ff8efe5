"""Comparisons of times: what is estimated, what is taken out, and what cannot be said."""

from __future__ import annotations

import math

import numpy as np
import pytest
from canary_traffic import Comparison, Traffic

from microserve.protocol.messages.strategy.scores import NUM_SUMS
from microserve.services.index.trial.comparison import (
    BETTER,
    MIN_SIDE,
    NOT_YET,
    WORSE,
    Result,
    compare_times,
)
from microserve.services.index.trial.judging import ALPHA, is_better, is_not_worse, judge, why_worse
from microserve.services.index.trial.merging import added_sides


def sums_of(rows: np.ndarray) -> list[float]:
    """Of (u, v, w, y) a row."""
    z = np.column_stack([np.ones(len(rows)), rows])
    return [float(each) for each in (z.T @ z)[np.triu_indices(5)]]


def rows_of(rng: np.random.Generator, count: int, effect: float, scatter: float = 0.3) -> np.ndarray:
    given = rng.normal(5.0, 2.0, (count, 3))
    y = 0.5 * given[:, 0] - 0.2 * given[:, 1] + 0.1 * given[:, 2] + effect + rng.normal(0.0, scatter, count)
    return np.column_stack([given, y])


def test_a_ratio_is_found_beside_what_is_known_of_the_requests() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = rows_of(rng, 400, math.log(1.3)), rows_of(rng, 4000, 0.0)
    found = compare_times(sums_of(ours), sums_of(theirs), 0.02)
    assert found.low < 1.3 < found.high
    assert (found.verdict, found.num) == (WORSE, (400, 4000))
    assert found.high / found.low < 1.2
    mirrored = compare_times(sums_of(theirs), sums_of(ours), 0.02)
    assert mirrored.verdict == BETTER
    assert mirrored.ratio == pytest.approx(1 / found.ratio)
    ordinary, *_ = np.linalg.lstsq(
        np.vstack([np.column_stack([np.full(len(r), f), np.ones(len(r)), r[:, :3]]) for r, f in
                   ((ours, 1.0), (theirs, 0.0))]),
        np.concatenate([ours[:, 3], theirs[:, 3]]),
    )  # fmt: skip
    assert math.log(found.ratio) == pytest.approx(float(ordinary[0]), rel=1e-6), "as by least squares"


def test_without_what_is_known_the_same_requests_say_less() -> None:
    rng = np.random.default_rng(2)
    ours, theirs = rows_of(rng, 200, math.log(1.2)), rows_of(rng, 200, 0.0)
    knowing = compare_times(sums_of(ours), sums_of(theirs), 0.05)
    for rows in (ours, theirs):
        rows[:, :3] = 0.0
    blind = compare_times(sums_of(ours), sums_of(theirs), 0.05)
    assert knowing.verdict == WORSE
    assert blind.verdict == NOT_YET
    assert math.log(blind.high / blind.low) > 3 * math.log(knowing.high / knowing.low)


@pytest.mark.parametrize("known", [0.0, 7.0])
def test_what_does_not_vary_or_says_the_same_twice_is_no_trouble(known: float) -> None:
    rng = np.random.default_rng(3)
    ours, theirs = rows_of(rng, 100, 0.5), rows_of(rng, 100, 0.0)
    for rows in (ours, theirs):
        rows[:, 1] = rows[:, 0]
        rows[:, 2] = known
    assert compare_times(sums_of(ours), sums_of(theirs), 0.05).verdict == WORSE


def test_of_too_few_nothing_is_said() -> None:
    rng = np.random.default_rng(4)
    many, few = sums_of(rows_of(rng, 500, 0.0)), sums_of(rows_of(rng, MIN_SIDE - 1, 3.0))
    for ours, theirs in ((few, many), (many, few), ([], many), (many, [])):
        found = compare_times(ours, theirs, 0.05)
        assert (found.verdict, found.growth) == (NOT_YET, math.inf)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -1e308, 0.0])
def test_what_is_no_sum_of_anything_is_no_result(odd: float) -> None:
    rng = np.random.default_rng(5)
    good = sums_of(rows_of(rng, 100, 0.0))
    for ours in ([odd] * NUM_SUMS, [100.0, *[odd] * (NUM_SUMS - 1)], [100.0] * 3, [-5.0] * NUM_SUMS):
        found = compare_times(ours, good, 0.05)
        assert isinstance(found, Result)
        assert found.verdict == NOT_YET


def test_it_says_how_many_more_it_takes() -> None:
    """As if what came so far came again and again."""
    rng = np.random.default_rng(6)
    ours, theirs = rows_of(rng, 60, 0.12), rows_of(rng, 60, 0.0)
    found = compare_times(sums_of(ours), sums_of(theirs), 0.02)
    assert found.verdict == NOT_YET
    assert 1.0 < found.growth < 100.0
    for factor, verdict in ((found.growth * 0.9, NOT_YET), (found.growth * 1.1, WORSE)):
        one, other = ([factor * each for each in sums_of(rows)] for rows in (ours, theirs))
        assert compare_times(one, other, 0.02).verdict == verdict


def test_several_routers_say_together_what_one_would_have_said() -> None:
    comparison = Comparison(Traffic(factor=1.2), seed=1)
    first = second = None
    for number, sides in enumerate(comparison.steps(300)):
        if number == 99:
            first = sides
        second = sides
    assert first is not None and second is not None
    parts = [
        (side, type(side)(
            whole.num_requests - side.num_requests,
            whole.num_failed - side.num_failed,
            *([a - b for a, b in zip(getattr(whole, name), getattr(side, name), strict=True)]
              for name in ("ttft", "tpot", "jct")),
        ))
        for side, whole in zip(first, second, strict=True)
    ]  # fmt: skip
    one, other = (added_sides(each) for each in parts)
    ours, whole = judge(one, other, 0.5), judge(*second, 0.5)
    for name, result in whole.items():
        assert ours[name].num == result.num
        assert ours[name].high == pytest.approx(result.high)


def test_what_follows_from_results() -> None:
    better, worse, open_ = Result((9, 9), 0.8, 0.7, 0.9), Result((9, 9), 1.2, 1.1, 1.3), Result((9, 9))
    near = Result((9, 9), 1.0, 0.97, 1.03)
    results = {"TTFT": better, "TPOT": worse, "JCT": open_, "failures": open_}
    assert is_better(results) and not is_not_worse(results), "nobody knows of the whole of it"
    assert is_not_worse(results | {"JCT": near})
    assert "JCT 1.20 times" in why_worse(results | {"JCT": worse})
    assert not is_better(results | {"failures": worse})
    assert not is_better(results | {"TTFT": near})
    assert ALPHA == 0.05
