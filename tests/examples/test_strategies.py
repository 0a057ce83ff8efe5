"""The strategies of ``examples/strategies/``, and those of the same trial that come with the router: what an
author does with each. Checked, simulated with an engine that dies, and served by processes with a kill -9."""

from __future__ import annotations

import ast
import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from microserve.protocol import log
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.messages.strategy.control import Scalar
from microserve.services.simulation.load.planner import points_of
from microserve.services.simulation.load.point import run_point
from microserve.services.simulation.load.task import SimulateTask
from tests.support.bus.gateway_peer import Answer, BusClient
from tests.support.engine.engine_client import EngineClient
from tests.support.process.processes import MeshProcesses

ROOT = Path(__file__).parents[2]
EXAMPLES, SHIPPED = ROOT / "examples" / "strategies", ROOT / "services" / "router" / "strategies"
MAX_LINES = 60


class Example(NamedTuple):
    name: str
    file: Path
    parameters: dict[str, Scalar]
    """So that prompts of 50 to 400 tokens on three small engines meet all that it does."""


EIGHT = [
    Example("by_size", EXAMPLES / "by_size.py", {"border": 200}),
    Example("sticky", SHIPPED / "placing" / "sticky.py", {}),
    Example("hedged", SHIPPED / "placing" / "hedged.py", {"after_s": 0.02}),
    Example("second_chance", EXAMPLES / "second_chance.py", {"silent_s": 0.5}),
    Example("hedged_prefill", EXAMPLES / "hedged_prefill.py", {"after_s": 0.02}),
    Example("thirds", SHIPPED / "splitting" / "thirds.py", {"least": 32}),
    Example("ewma", EXAMPLES / "ewma.py", {}),
    Example("own_lru", EXAMPLES / "own_lru.py", {"step": 32}),
]
by_name = pytest.mark.parametrize("example", EIGHT, ids=lambda example: example.name)


def test_each_is_short_and_uses_the_authors_door_alone() -> None:
    assert {example.file for example in EIGHT} >= set(EXAMPLES.glob("*.py"))
    for example in EIGHT:
        source = example.file.read_text()
        assert len(source.splitlines()) <= MAX_LINES, example.file
        imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
        ours = {node.module for node in imports if (node.module or "").startswith("microserve")}
        assert ours == {"microserve.services.router.authoring"}, example.file


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(
            each, marks=[pytest.mark.heavy] if each.file.is_relative_to(SHIPPED) else [], id=each.name
        )
        for each in EIGHT
    ],
)
def test_each_passes_the_check_that_an_author_makes(example: Example) -> None:
    words = ["strategy", "check", str(example.file), "--name", example.name]
    for name, value in example.parameters.items():
        words += ["--set", f"{name}={value}"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "microserve.services", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


def write_trace(path: Path) -> None:
    """Talks of three users; a turn's prompt begins with the turn before it."""
    rng = random.Random(3)
    with path.open("w") as file:
        for number in range(40):
            talk, turn = rng.randrange(6), rng.randrange(1, 6)
            line = {
                "timestamp": number * 250,
                "input_length": turn * 1024,
                "output_length": rng.randrange(50, 250),
                "hash_ids": [talk * 100 + block for block in range(turn * 2)],
                "attributes": {"user": f"u{talk % 3}"},
            }
            file.write(json.dumps(line) + "\n")


@by_name
def test_each_serves_a_trace_in_virtual_time_though_an_engine_dies(example: Example, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    write_trace(trace)
    is_own = example.file.is_relative_to(EXAMPLES)
    task = SimulateTask(
        trace=str(trace),
        strategies=[str(example.file) if is_own else example.name],
        loads=[4.0],
        num_engines=3,
        num_requests=0,
        kill=["engine-1@3-6"],
    )
    [point] = points_of(task)
    result = run_point(point)
    assert (result.strategy, result.num_served, result.num_failed) == (example.name, 40, 0)


# --- live ------------------------------------------------------------------------------------------

NUM_ENGINES, IN_FLIGHT, TTL_S = 3, 24, 90.0
LONG = SamplingParams(max_tokens=160, temperature=1.0, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def mesh(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeshProcesses]:
    settings = [
        f"router.strategies.{example.name}.{name}={json.dumps(value)}"
        for example in EIGHT
        for name, value in example.parameters.items()
    ]
    files = json.dumps([str(example.file) for example in EIGHT if example.file.is_relative_to(EXAMPLES)])
    settings.append(f"router.strategy_files={files}")
    directory = tmp_path_factory.mktemp("live")
    own = {"router": settings}
    with MeshProcesses(tiny_model, directory, num_engines=NUM_ENGINES, own_settings=own) as started:
        yield started


def start_all(client: BusClient, strategy: str) -> list[Answer]:
    """The same requests whatever the strategy: four beginnings, six users."""
    rng = random.Random(5)
    beginnings = [[rng.randrange(20, 250) for _ in range(rng.randrange(40, 300))] for _ in range(4)]
    return [
        client.start(
            [*beginnings[number % 4], *(rng.randrange(20, 250) for _ in range(rng.randrange(10, 100)))],
            LONG,
            strategy=strategy,
            ttl_s=TTL_S,
            attributes={"user": f"u{number % 6}"},
        )
        for number in range(IN_FLIGHT)
    ]


async def all_of(answers: list[Answer]) -> list[tuple[str, list[int]]]:
    async with asyncio.timeout(TTL_S + 10.0):
        for answer in answers:
            await answer.done.wait()
    return [(answer.result.code or answer.reason, answer.token_ids) for answer in answers]


async def busiest(bus: ZmqBus, mesh: MeshProcesses) -> str:
    """The engine that generates most now."""
    running = {}
    for name, service in mesh.services.items():
        if name.startswith("engine"):
            async with EngineClient(bus, service.address) as engine:
                running[name] = (await engine.stats()).load.num_running
    victim = max(running, key=lambda name: running[name])
    assert running[victim], running
    return victim


async def kill_under(mesh: MeshProcesses, strategy: str) -> tuple[str, list[Answer]]:
    bus = ZmqBus(linger_s=0.1)
    try:
        async with BusClient(bus, mesh.router_address) as client:
            await client.wait_engines(NUM_ENGINES)
            expected = await all_of(start_all(client, "data_parallel"))
            assert {reason for reason, _ in expected} == {"length"}
            answers = start_all(client, strategy)
            async with asyncio.timeout(TTL_S):
                for answer in answers[: IN_FLIGHT // 4]:
                    await answer.grown.wait()
            victim = await busiest(bus, mesh)
            mesh.services[victim].kill()
            assert await all_of(answers) == expected
            return victim, answers
    finally:
        bus.close()


@pytest.mark.heavy
@pytest.mark.system
@by_name
def test_each_serves_on_when_an_engine_is_killed_under_load(example: Example, mesh: MeshProcesses) -> None:
    """0 failed, 0 wrong; what the dead engine had went on elsewhere, and no strategy made a mistake."""
    num_lines = len(mesh.events("router"))
    victim, answers = asyncio.run(kill_under(mesh, example.name))
    mesh.services.pop(victim)
    mesh.start(victim)
    assert {answer.result.strategy for answer in answers} == {example.name}
    assert [answer for answer in answers if victim in answer.result.engines]
    events = [event["event"] for event in mesh.events("router")[num_lines:]]
    assert log.REQUEST_CONTINUED in events
    assert log.STRATEGY_FAILED not in events
