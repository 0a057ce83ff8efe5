"""Worlds in which KV goes by a codec keep every promise, torn, lost and bent payloads among their faults."""

from __future__ import annotations

import pytest

from microserve.services.simulation.faults.campaign import run_seed
from microserve.services.simulation.faults.coded import coded
from microserve.services.simulation.faults.scenario import draw

SEEDS = 60


@pytest.mark.slow
def test_every_promise_holds_in_worlds_with_codecs() -> None:
    broken = {}
    num_complete = num_payloads = num_torn = 0
    for seed in range(SEEDS):
        verdict = run_seed(seed, scenario=coded(draw(seed)))
        num_complete += verdict.outcomes["length"] + verdict.outcomes["stop"]
        num_payloads += verdict.faults["payload"]
        num_torn += verdict.faults["torn write"] + verdict.faults["bent write"]
        if verdict.violations:
            broken[seed] = verdict.violations[:3]
    assert broken == {}
    assert num_complete > 100 and num_payloads > 100 and num_torn > 10
