"""The programs of ``examples/``, each run as its first lines say."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.process.processes import MeshProcesses

EXAMPLES = Path(__file__).parents[2] / "examples"
DOORS = (
    "microserve.protocol.bus.curve.",
    "microserve.protocol.messages.",
    "microserve.protocol.settings.",
    "microserve.services.command.",
    "microserve.services.local.",
    "microserve.services.router.authoring",
    "microserve.services.simulation.load.",
)
pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def mesh(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeshProcesses]:
    with MeshProcesses(tiny_model, tmp_path_factory.mktemp("examples"), gateway=True) as started:
        yield started


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_client_streams_an_answer(mesh: MeshProcesses) -> None:
    told = run("client.py", f"http://127.0.0.1:{mesh.gateway_port}", "--strategy", "disaggregated")
    read, written = map(int, re.findall(r"^(\d+) tokens read, (\d+) written$", told, re.M)[0])
    assert read > 0
    assert 0 < written <= 32


def test_a_strategy_of_ones_own_is_published_changed_and_taken_back(mesh: MeshProcesses) -> None:
    told = run("own_strategy.py", mesh.index_address, f"http://127.0.0.1:{mesh.gateway_port}")
    first, second = re.findall(r"^publish: version (\d+), applied by 1 router", told, re.M)
    served = re.findall(r"^served by version (\d+)$", told, re.M)
    assert served == [first, second, first]
    assert re.search(r"^retire: version \d+", told, re.M)


def test_a_mesh_is_started_from_python_and_leaves_nothing(tiny_model: Path) -> None:
    told = run("mesh_from_python.py", str(tiny_model), "--engines", "1")
    assert re.search(r"^\d+ tokens, the first after", told, re.M)
    states = dict(re.findall(r"^([\w-]+): (\w+)$", told, re.M))
    assert states == dict.fromkeys(("index", "router", "engine-e0", "gateway"), "stopped")


def test_a_trace_is_simulated() -> None:
    told = run("simulate_trace.py", "--requests", "12", "--engines", "2").splitlines()
    assert [line.split()[0] for line in told] == [
        "strategy",
        "data_parallel",
        "cache_aware",
        "balanced_adaptive",
    ]


def test_every_example_is_run_here_and_imports_public_doors_only() -> None:
    text = Path(__file__).read_text()
    programs = sorted(EXAMPLES.glob("*.py"))
    assert len(programs) == 4
    for program in programs:
        assert f'run("{program.name}"' in text
        for node in ast.walk(ast.parse(program.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("microserve"):
                assert f"{node.module}.".startswith(DOORS), f"{program.name}: {node.module}"
