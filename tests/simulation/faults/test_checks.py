"""Routers that check all the time in meshes full of faults: clients get what they always get, and no engine
that dies, freezes, leaves or is cut off is taken for one that computes something else."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from microserve.protocol import log
from microserve.protocol.messages.check import DIFFERS, EQUAL, UNFINISHED, PairCheck
from microserve.services.router.check.book import CheckBook
from microserve.services.simulation.faults.campaign import run_seed
from microserve.services.simulation.faults.scenario import draw

NUM_SEEDS = 24
INTERVAL_S = 0.4


def test_a_fault_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: Counter[str] = Counter()
    add = CheckBook.add

    def counting(self: CheckBook, check: PairCheck, now: float) -> None:
        outcomes[check.outcome] += 1
        add(self, check, now)

    monkeypatch.setattr(CheckBook, "add", counting)
    for seed in range(NUM_SEEDS):
        drawn = draw(seed)
        scenario = replace(drawn, shape=replace(drawn.shape, check_interval_s=INTERVAL_S))
        verdict = run_seed(seed, scenario=scenario)
        assert not verdict.violations, f"seed {seed}: {verdict.violations[:5]}"
        assert not verdict.events[log.CHECK_DIFFERS], f"seed {seed}"
    assert not outcomes[DIFFERS]
    # With nothing but good ends it would prove nothing.
    assert outcomes[EQUAL] > NUM_SEEDS
    assert outcomes[UNFINISHED] > 0
