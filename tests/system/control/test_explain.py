"""Why did this request go there: asked of real processes, for the oldest of ten thousand, by the command."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.bus.gateway_peer import BusClient
from tests.support.process.processes import MeshProcesses
from tests.support.router.swaps import GREEDY, PROMPTS

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

OTHER = """
from microserve.services.router.authoring import strategy

@strategy
async def other(mesh, request):
    yield mesh.engines()[-1].start_generate(request)
"""
HANGS = OTHER.replace("    yield", "    while True:\n        pass\n    yield")


def explain(mesh: MeshProcesses, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "microserve.services", "explain", *words]
    return subprocess.run(
        [*command, "--index", mesh.index_address], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_command_answers_for_a_request_and_for_another_strategy(tiny_model: Path, tmp_path: Path) -> None:
    with MeshProcesses(tiny_model, tmp_path, num_engines=2, num_routers=2) as mesh:
        run = partial(explain, mesh)
        asyncio.run(ask(mesh))
        done = run("first")
        assert done.returncode == 0, done.stderr
        assert "first.0a0a0a0a-0  on router  auto  ended" in done.stdout
        assert "pick decode by cost" in done.stdout and "generates on" in done.stdout
        [told] = json.loads(run("cmpl-first.0a0a0a0a", "--strategy", "data_parallel", "-o", "json").stdout)
        assert told["replayed"][0]["mistake"] == ""
        for source, expected in ((OTHER, "generates on"), (HANGS, "held the router")):
            file = tmp_path / "other.py"
            file.write_text(source)
            done = run("first", "--strategy", str(file))
            assert done.returncode == 0, done.stderr
            assert expected in done.stdout.partition("by what was known then")[2]
        missing = run("nobody")
        assert missing.returncode == 1
        assert "router has 6 requests" in missing.stderr and "router-1 has 0 requests" in missing.stderr


async def ask(mesh: MeshProcesses) -> None:
    bus = ZmqBus(linger_s=0.1)
    try:
        async with BusClient(bus, mesh.router_address) as client:
            await client.wait_engines(2)
            for number, name in enumerate(("first", "b", "c", "d", "e", "f")):
                answer = await client.generate(
                    PROMPTS[number], GREEDY, strategy="auto", request_id=f"{name}.0a0a0a0a-0"
                )
                assert answer.reason == "length"
                assert answer.result.why
    finally:
        bus.close()


KEPT, MORE, AT_ONCE = 10_000, 60, 100


async def ask_many(mesh: MeshProcesses) -> None:
    """More requests than are kept, by names of their numbers."""
    bus = ZmqBus(linger_s=0.1)
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    try:
        async with BusClient(bus, mesh.router_address) as client:
            await client.wait_engines(2)
            free = asyncio.Semaphore(AT_ONCE)

            async def one(number: int) -> None:
                async with free:
                    name = f"r{number}.0a0a0a0a-0"
                    answer = await client.generate([20 + number % 200, 30], params, request_id=name)
                    assert answer.reason == "length", answer.result

            async with asyncio.TaskGroup() as tasks:
                for number in range(KEPT + MORE):
                    tasks.create_task(one(number))
    finally:
        bus.close()


@pytest.mark.heavy
def test_any_of_the_last_ten_thousand_is_answered_by_one_command(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    took_s = []
    with MeshProcesses(tiny_model, tmp_path, num_engines=2) as mesh:
        asyncio.run(ask_many(mesh))
        for number in (
            MORE + AT_ONCE,
            KEPT // 2,
            KEPT + MORE - 1,
        ):  # they do not end in the order of their numbers
            began = time.monotonic()
            done = explain(mesh, f"r{number}")
            took_s.append(time.monotonic() - began)
            assert done.returncode == 0, done.stderr
            assert f"r{number}.0a0a0a0a-0  on router" in done.stdout and "pick " in done.stdout
        gone = explain(mesh, "r0")
        assert gone.returncode == 1 and f"router has {KEPT} requests" in gone.stderr
    with capsys.disabled():
        print("\nexplain among 10,000 requests: " + ", ".join(f"{each:.2f} s" for each in took_s))
