"""Strategies swapped on a living mesh of real processes: under load, by the command, and through kills."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import MeshError
from microserve.protocol.messages.strategy.control import ControlReport
from microserve.services.command.shared.control_client import ControlClient
from tests.support.bus.gateway_peer import BusClient
from tests.support.process.processes import MeshProcesses
from tests.support.router.swaps import GREEDY, PROMPTS, run_swaps, source

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


async def everybody(control: ControlClient, version: int = 0) -> ControlReport:
    """Wait until both routers run what the index says, ``version`` or later."""
    async with asyncio.timeout(60):
        while True:
            with suppress(MeshError):
                report = await control.report()
                now = report.state.version
                if (
                    len(report.routers) == 2
                    and {router.version for router in report.routers} == {now}
                    and now >= version
                ):
                    return report
            await asyncio.sleep(0.05)


def test_swaps_under_load_lose_nothing_and_reach_everybody(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cut of ``make swaps``."""
    swapped = run_swaps(tiny_model, tmp_path, seconds=8.0, num_swaps=130, rate=30.0)
    assert swapped.wrong == []
    assert swapped.num_swaps == 130
    assert swapped.num_versions > 1, "some requests met each other's versions"
    assert swapped.num_doubled and swapped.num_late
    with capsys.disabled():
        print(f"\n{swapped}")


def test_the_command_publishes_checks_and_takes_back(tiny_model: Path, tmp_path: Path) -> None:
    settings = [f"index.control_path={tmp_path / 'control.db'}"]
    with MeshProcesses(tiny_model, tmp_path, num_engines=1, num_routers=2, settings=settings) as mesh:
        publish_by_the_command(mesh, tmp_path)


def publish_by_the_command(mesh: MeshProcesses, tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "microserve.services", "strategy", *words]
        return subprocess.run(
            [*command, "--index", mesh.index_address], capture_output=True, text=True, timeout=60, check=False
        )

    good, bad = tmp_path / "mine.py", tmp_path / "bad.py"
    good.write_text(source(0))
    bad.write_text(source(0).replace("    async for", "    raise ValueError('boo')\n    async for"))
    done = run("publish", str(good), "--reason", "first")
    assert done.returncode == 0, done.stderr
    assert "router  version 1" in done.stdout
    assert "router-1  version 1" in done.stdout
    done = run("publish", str(bad), "--name", "mine")
    assert done.returncode == 1
    assert "boo" in done.stderr
    assert "first" in run("history").stdout
    assert "mine" in run("list").stdout
    assert "sha256" in run("show", "mine").stdout
    assert run("promote", "mine").returncode == 1
    dark = tmp_path / "dark.py"
    dark.write_text(source(1))
    done = run("publish", str(dark), "--name", "mine", "--shadow", "--max-ttft", "30")
    assert done.returncode == 0, done.stderr
    asyncio.run(ask(mesh, "mine", 6))
    shown = run("show", "mine").stdout
    assert "TTFT <= 30 s" in shown
    assert sum(int(words[1]) for line in shown.splitlines() if (words := line.split())[0:1] == ["router"]) > 0
    assert run("promote", "mine", "--shadow").returncode == 0
    assert run("rollback", "mine").returncode == 0
    done = run("set", "data_parallel", "no_such=1")
    assert done.returncode == 1
    assert "no such parameter" in done.stderr, "the routers refuse it, and it is taken back"
    package = tmp_path / "two_files"
    package.mkdir()
    (package / "__init__.py").write_text(f"from .where import LABEL\n{source(0)}")
    (package / "where.py").write_text("LABEL = None\n")
    assert run("check", str(package), "--live").returncode == 0
    done = run("publish", str(package))
    assert done.returncode == 0, done.stderr
    asyncio.run(answered(mesh, "two_files"))
    assert "where.py\nLABEL = None" in run("show", "two_files").stdout


async def answered(mesh: MeshProcesses, strategy: str) -> None:
    bus = ZmqBus(linger_s=0.1)
    try:
        async with BusClient(bus, mesh.router_address) as client:
            await client.wait_engines(1)
            answer = await client.generate(PROMPTS[0], GREEDY, strategy=strategy)
            assert (answer.reason, answer.result.strategy_version > 0) == ("length", True)
    finally:
        bus.close()


async def ask(mesh: MeshProcesses, strategy: str, count: int) -> None:
    """So many requests of the first router, and wait until it has told the index of them."""
    bus = ZmqBus(linger_s=0.1)
    control = ControlClient(bus, mesh.index_address)
    try:
        async with BusClient(bus, mesh.router_address) as client:
            await client.wait_engines(1)
            for number in range(count):
                answer = await client.generate(PROMPTS[number % len(PROMPTS)], GREEDY, strategy=strategy)
                assert answer.reason == "length"
            async with asyncio.timeout(30):
                while not any(
                    score.num_decisions == count
                    for r in (await control.report()).routers
                    for score in r.shadows
                ):
                    await asyncio.sleep(0.05)
    finally:
        control.close()
        bus.close()


def test_index_and_router_killed_while_publishing_everywhere_or_nowhere(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"index.control_path={tmp_path / 'control.db'}"]
    with MeshProcesses(tiny_model, tmp_path, num_engines=1, num_routers=2, settings=settings) as mesh:
        outcomes = asyncio.run(_kill_while_publishing(mesh))
    with capsys.disabled():
        print(f"\nkilled while publishing: {outcomes}")


async def _kill_while_publishing(mesh: MeshProcesses) -> list[str]:
    bus = ZmqBus(linger_s=0.1)
    outcomes = []
    try:
        control = ControlClient(bus, mesh.index_address)
        before = await control.change("publish", "mine", source=source(0))
        control.close()
        latest = 0
        # Before the message is there, while it is dealt with, after it has been answered.
        for number, delay_s in enumerate((0.0, 0.002, 0.006), 1):
            # Of short patience: what it does not hear of it does not repeat.
            hasty = ControlClient(bus, mesh.index_address, timeout_s=0.3)
            await hasty.report()
            publishing = asyncio.create_task(hasty.change("publish", "mine", source=source(number)))
            await asyncio.sleep(delay_s)
            for victim in ("index", "router-1"):
                mesh.services[victim].process.kill()
            answered = 0
            with suppress(MeshError):
                answered = await publishing
            hasty.close()
            for victim in ("index", "router-1"):
                mesh.services[victim].process.wait(10)
                mesh.start(victim)
            control = ControlClient(bus, mesh.index_address)
            report = await everybody(control, before)
            assert report.durable
            version = report.state.version
            assert version in (before, before + 1)
            assert version >= answered, "what was answered is everywhere"
            [entry] = report.state.entries
            assert entry.stable is not None
            if version > before:
                before, latest = version, number
                outcomes.append("everywhere")
            else:
                outcomes.append("nowhere")
            assert entry.stable.source == source(latest)
            await serve_at_both(bus, mesh, entry.stable.version)
            control.close()
        return outcomes
    finally:
        bus.close()


async def serve_at_both(bus: ZmqBus, mesh: MeshProcesses, version: int) -> None:
    for address in mesh.router_addresses.values():
        async with BusClient(bus, address) as client:
            await client.wait_engines(1)
            answer = await client.generate(PROMPTS[0], GREEDY, strategy="mine")
            assert answer.ended is not None
            assert (answer.reason, answer.ended.strategy_version) == ("length", version)
