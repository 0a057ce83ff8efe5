"""Intervals of shares: where they lie, and how often they hold what they are of."""

from __future__ import annotations

import random

import pytest

from microserve.services.command.profile.measure.interval import relative, wilson


def test_known_values_of_wilson() -> None:
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0.3, 0) == (0.0, 1.0)


def test_no_loss_among_few_is_no_proof() -> None:
    share, low, high = relative(20, 0, 0, 25)
    assert share == 1.0
    assert low < 0.85 and high > 1.0
    assert relative(800, 0, 0, 1000)[1] > 0.99


def test_what_is_gained_counts_as_well() -> None:
    share, low, high = relative(20, 2, 3, 25)
    assert share == pytest.approx(21 / 20)
    assert low < 1.0 < high


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    chance, held, rounds = random.Random(3), 0, 400
    for _ in range(rounds):
        before = [chance.random() < 0.8 for _ in range(120)]
        after = [chance.random() < (0.9 if was else 0.1) for was in before]
        lost = sum(was and not now for was, now in zip(before, after, strict=True))
        gained = sum(now and not was for was, now in zip(before, after, strict=True))
        _, low, high = relative(sum(before), lost, gained, 120)
        held += low <= (0.8 * 0.9 + 0.2 * 0.1) / 0.8 <= high
    assert held / rounds > 0.92
