"""Comparisons of failures."""

from __future__ import annotations

import math

import pytest

from microserve.services.index.trial.comparison import BETTER, NOT_YET, WORSE
from microserve.services.index.trial.failures import _log_e, compare_failures


def test_who_fails_more_often_is_worse_by_that_much() -> None:
    found = compare_failures((40, 1000), (90, 9000), 0.1, 0.01)
    assert found.verdict == WORSE
    assert found.ratio == pytest.approx(4.0)
    assert found.low < 4.0 < found.high
    assert compare_failures((90, 9000), (40, 1000), 0.9, 0.01).verdict == BETTER


def test_few_failures_say_little_and_none_nothing() -> None:
    assert compare_failures((0, 1000), (0, 9000), 0.1, 0.01).growth == math.inf
    found = compare_failures((1, 1000), (0, 9000), 0.1, 0.01)
    assert (found.verdict, found.ratio) == (NOT_YET, math.inf)
    assert 1.0 < found.growth < 10.0
    assert compare_failures((3, 3), (0, 400), 0.01, 0.01).verdict == WORSE, (
        "three of three, of a canary of 1 %"
    )
    assert compare_failures((0, 100), (12, 100), 0.5, 0.01).verdict == BETTER


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_equals_are_called_equals_however_often_one_looks(share: float) -> None:
    """Not by lot: the chance of every sequence of failures that has not been stopped, summed up."""
    alpha, open_, alarmed = 0.05, {0: 1.0}, 0.0
    for num_failures in range(1, 150):
        grown: dict[int, float] = {}
        for ours, chance in open_.items():
            grown[ours] = grown.get(ours, 0.0) + chance * (1 - share)
            grown[ours + 1] = grown.get(ours + 1, 0.0) + chance * share
        open_ = {}
        for ours, chance in grown.items():
            if _log_e(ours, num_failures - ours, share, share) >= -math.log(alpha):
                alarmed += chance
            else:
                open_[ours] = chance
    assert 0.001 < alarmed <= alpha


def test_a_verdict_is_where_the_evidence_is() -> None:
    for ours in range(12):
        found = compare_failures((ours, 100), (10 - min(ours, 10), 100), 0.3, 0.05)
        evidence = _log_e(ours, 10 - min(ours, 10), 0.3, 0.3)
        assert (found.verdict != NOT_YET) == (evidence >= -math.log(0.05))
