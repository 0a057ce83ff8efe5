"""A short run of chaos between hosts: ``make chaos ARGS="--hosts --seconds 600"`` is a long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.chaos.faults import BETWEEN_HOSTS, LINKS, plan_faults
from tests.support.chaos.run import Chaos, run_chaos

SEED = 1


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_every_promise_is_kept_between_hosts(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run_chaos(Chaos(tiny_model, seconds=20.0, seed=SEED, rate=6.0, hosts=True), tmp_path)
    with capsys.disabled():
        print(f"\n{report.table()}")
    assert report.problems == []
    assert {fault.kind for fault in report.faults} & {*LINKS, "vanish"}
    assert report.verdict.counts["completed"] > 0


def test_hosts_are_harmed_as_often_as_processes() -> None:
    kinds = [plan.kind for plan in plan_faults(2_000.0, 1.0, SEED, BETWEEN_HOSTS)]
    assert set(kinds) == {kind for kind, _ in BETWEEN_HOSTS}
    of_hosts = sum(kind in (*LINKS, "vanish") for kind in kinds)
    assert 0.3 < of_hosts / len(kinds) < 0.5
