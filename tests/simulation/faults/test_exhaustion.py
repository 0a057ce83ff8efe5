"""Storms in which processes also run out of descriptors: every promise holds, and it happens often enough."""

from __future__ import annotations

import pytest

from microserve.services.simulation.faults.campaign import run_seed
from microserve.services.simulation.faults.exhaustion import with_exhaustion
from microserve.services.simulation.faults.scenario import draw

NUM_WORLDS = 60


@pytest.mark.timeout(240)
def test_no_promise_is_broken_by_a_lack_of_descriptors() -> None:
    broken, refused = [], 0
    for seed in range(1, NUM_WORLDS + 1):
        verdict = run_seed(seed, keep=True, scenario=with_exhaustion(draw(seed)))
        broken += [f"{seed}: {violation}" for violation in verdict.violations]
        refused += any("Too many open files" in line for line in verdict.lines)
    assert broken == []
    assert refused > NUM_WORLDS // 6, "a lack that nobody notices shows nothing"
