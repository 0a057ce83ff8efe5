"""Whether lengths have gone elsewhere since the last plan."""

from __future__ import annotations

import random

import pytest

from microserve.services.clusters.drift import LengthDrift
from microserve.services.clusters.lengths import Lengths

pytestmark = pytest.mark.quick


def feed(drift: LengthDrift, rng: random.Random, mu: float, count: int) -> None:
    for _ in range(count):
        drift.add(int(rng.lognormvariate(mu, 0.7)))


def test_the_first_plan_is_due_when_there_is_enough_to_plan_by() -> None:
    drift, rng = LengthDrift(), random.Random(1)
    feed(drift, rng, 9.0, 127)
    assert not drift.is_due
    feed(drift, rng, 9.0, 1)
    assert drift.is_due


def test_the_same_lengths_need_no_other_plan_and_longer_ones_do() -> None:
    drift, rng = LengthDrift(), random.Random(2)
    feed(drift, rng, 9.0, 400)
    drift.take()
    for _ in range(20):
        feed(drift, rng, 9.0, 100)
        assert not drift.is_due, drift.distance
    feed(drift, rng, 10.0, 400)
    assert drift.is_due
    drift.take()
    assert drift.distance == 0.0
    assert not drift.is_due


def test_what_is_taken_is_what_came() -> None:
    drift, rng = LengthDrift(window=1 << 30), random.Random(3)
    sample = [int(rng.lognormvariate(9.0, 0.7)) + 1 for _ in range(4000)]
    for each in sample:
        drift.add(each)
    made, real = Lengths.from_histogram(drift.take()), Lengths([float(each) for each in sample])
    assert made.mean == pytest.approx(real.mean, rel=0.05)
    assert made.part([9000.0]).share_long[0] == pytest.approx(real.part([9000.0]).share_long[0], abs=0.03)


def test_prompts_that_are_wholly_cached_count_and_old_ones_fade() -> None:
    drift = LengthDrift(window=8, fewest=4)
    for _ in range(64):
        drift.add(0)
    drift.take()
    for _ in range(6):
        drift.add(4096)
    assert drift.is_due
    for _ in range(200):
        drift.add(4096)
    assert len(drift.take()) == 2, "one bucket, and the one below it, where it begins"
