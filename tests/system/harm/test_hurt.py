"""The short form of tests/chaos/hurt.py: every hurt at least once, and nobody served is any the worse."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.chaos.hurt import Hurt, run_hurt

pytestmark = [pytest.mark.heavy, pytest.mark.system]


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk can be mounted by root only")
@pytest.mark.timeout(420)
def test_what_hurts_costs_nobody_who_is_served(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    account = run_hurt(Hurt(tiny_model, seconds=24.0, streams=3.0, refusals=300, bodies=0.2), tmp_path)
    with capsys.disabled():
        print(f"\n{account.table()}")
    assert account.problems == []
    counts = account.counts
    for name in ("right", "refusals", "disk filled", "descriptors used up", "engine killed"):
        assert counts[name] > 0, name
