"""benchmarks/mesh/control_plane.py with few requests: real services around instant engines, whole answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "mesh" / "control_plane.py"


@pytest.mark.heavy
@pytest.mark.parametrize("flags", [["--locked"], ["--chat"]])
def test_every_process_is_measured_and_no_token_merges(tiny_model: Path, flags: list[str]) -> None:
    command = [sys.executable, str(BENCHMARK), "--model", str(tiny_model), "--rounds=1", "--scale=0.05"]
    done = subprocess.run([*command, "--json", *flags], env=os.environ, stdout=subprocess.PIPE, check=True)
    figures = json.loads(done.stdout)

    assert figures["locked"] is ("--locked" in flags)
    costs = {name: value["now"] for name, value in figures.items() if name.startswith("CPU us")}
    assert len(costs) == 12 and all(value > 0 for value in costs.values())
    for what in ("request, alone", "request, 16 in flight", "token, paced"):
        each = [costs[f"CPU us a {what}: {kind}"] for kind in ("gateway", "router", "gateway + router")]
        assert each[0] + each[1] == pytest.approx(each[2], rel=0.5)  # medians of a round each
    assert 0.1 < figures["events a token, paced"]["now"] < 1.1  # a stream's end is an event of its own


def test_a_decision_is_timed_with_its_record_and_without() -> None:
    command = [sys.executable, str(BENCHMARK.with_name("picks.py")), "--rounds=1", "--requests=40", "--json"]
    done = subprocess.run(command, env=os.environ, stdout=subprocess.PIPE, check=True)
    figures = json.loads(done.stdout)
    assert list(figures) == ["2", "8", "32"]
    assert all(found["without_us"] > 0 and found["with_us"] > 0 for found in figures.values())
    assert figures["2"]["record_nbytes"] < figures["32"]["record_nbytes"]
