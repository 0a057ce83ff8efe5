"""The campaign in short: meshes full of faults; every promise holds, and each mesh replays byte for byte."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

from microserve.services.simulation.faults.campaign import run_seed
from microserve.services.simulation.faults.fates import FAULT_KINDS
from microserve.services.simulation.faults.scenario import CALM, SINGLE, STORM, draw

NUM_SEEDS = int(os.environ.get("MICROSERVE_TEST_SEEDS", "60"))


def test_every_promise_holds_in_every_mesh() -> None:
    faults: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    for seed in range(NUM_SEEDS):
        verdict = run_seed(seed)
        assert not verdict.violations, f"seed {seed}: {verdict.violations[:5]}"
        faults += verdict.faults
        outcomes += verdict.outcomes
    # A campaign in which nothing goes wrong, or nothing goes well, proves nothing.
    assert faults.total() > 15 * NUM_SEEDS
    assert outcomes["length"] + outcomes["stop"] > 0.6 * outcomes.total()


def test_scenarios_are_of_every_kind() -> None:
    scenarios = [draw(seed) for seed in range(300)]
    assert {scenario.kind for scenario in scenarios} == {CALM, SINGLE, STORM}
    kinds = {fault.kind for scenario in scenarios for fault in scenario.faults}
    assert kinds == set(FAULT_KINDS)
    assert draw(7) == draw(7)


def test_a_seed_replays_byte_for_byte_in_another_process() -> None:
    """With another hash seed, too: no order may come from a set."""
    digests = set()
    for hash_seed in ("1", "2"):
        script = "from microserve.services.simulation.faults.campaign import run_seed\n"
        script += "print(*[run_seed(seed).digest for seed in range(8)])"
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        digests.add(done.stdout)
    assert len(digests) == 1
    assert len(set(digests.pop().split())) == 8, "each seed is a mesh of its own"


def test_a_verdict_carries_the_journal_of_its_mesh() -> None:
    verdict = run_seed(3, keep=True)
    assert any("sim.fault" in line for line in verdict.lines)
    assert any("request.finished" in line for line in verdict.lines)
    assert run_seed(3).lines == []
