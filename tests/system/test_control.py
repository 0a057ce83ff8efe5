"""Strategies swapped on a living mesh of real processes: under load, by the command, and through kills."""

from __future__ import annotations

import asyncio
import itertools
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from bus_client import Answer, BusClient
from processes import MeshProcesses

from microserve.protocol import log
from microserve.protocol.control import ControlReport
from microserve.protocol.errors import MeshError
from microserve.protocol.sampling import SamplingParams
from microserve.protocol.transport import ZmqBus
from microserve.services.strategy_client import Applied, ControlClient

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

NUM_SWAPS = 50
WORKERS = 3
"""Requests under way at each router."""
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)

HEAD = (
    "from microserve.services.router.strategy import strategy\n\n@strategy\nasync def mine(mesh, request):\n"
)
PLAIN = """    async for tokens in mesh.pick(None, request).start_generate(request):
        yield tokens
"""
SPLIT = """    decode, prefill = mesh.pick(None, request), mesh.pick(None, request)
    grant = await decode.prep_recv(request, end=-1)
    sending = prefill.remote_send(request, grant, end=-1)
    async for tokens in decode.start_generate(request, begin=-1, after=sending):
        yield tokens
"""


def source(number: int) -> str:
    """Another one each time, of two kinds."""
    return f"# {number}\n{HEAD}{(PLAIN, SPLIT)[number % 2]}"


def prompt(number: int) -> list[int]:
    rng = random.Random(number)
    return [rng.randrange(20, 250) for _ in range(40 + 8 * number)]


PROMPTS = [prompt(number) for number in range(6)]


class Load:
    """Requests one after another at every router until it is stopped; every answer is kept."""

    def __init__(self, clients: list[BusClient]) -> None:
        self.answers: list[tuple[int, int, Answer]] = []
        """Number of the prompt, the version that everybody ran when it began, the answer."""
        self.acknowledged = 0
        self._stopping = False
        self._numbers = itertools.count()
        self._tasks = [asyncio.create_task(self._run(c)) for c in clients for _ in range(WORKERS)]

    async def _run(self, client: BusClient) -> None:
        while not self._stopping:
            number, known = next(self._numbers) % len(PROMPTS), self.acknowledged
            answer = await client.generate(PROMPTS[number], GREEDY, strategy="mine", ttl_s=60.0)
            self.answers.append((number, known, answer))

    async def stop(self) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)


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
    settings = [f"index.control_path={tmp_path / 'control.db'}"]
    with MeshProcesses(tiny_model, tmp_path, num_routers=2, settings=settings) as mesh:
        publish_by_the_command(mesh, tmp_path)
        applied, answers = asyncio.run(_swap_under_load(mesh))
        for name in mesh.router_addresses:  # nothing was saved by the fallback either
            assert [e for e in mesh.events(name) if e["event"] == log.STRATEGY_FAILED] == []
    times = sorted(each.seconds * 1e3 for each in applied)
    with capsys.disabled():
        print(
            f"\n{len(applied)} swaps, {len(answers)} requests meanwhile, none failed; from publish to all "
            f"acknowledged: p50 {times[len(times) // 2]:.1f} ms, p99 {times[int(len(times) * 0.99)]:.1f} ms"
        )


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
    done = run("set", "data_parallel", "no_such=1")
    assert done.returncode == 1
    assert "no such parameter" in done.stderr, "the routers refuse it, and it is taken back"


async def _swap_under_load(mesh: MeshProcesses) -> tuple[list[Applied], list[Answer]]:
    bus = ZmqBus(linger_s=0.1)
    control = ControlClient(bus, mesh.index_address)
    applied: list[Applied] = []
    try:
        first, second = mesh.router_addresses.values()
        async with BusClient(bus, first) as one, BusClient(bus, second) as other:
            for client in (one, other):
                await client.wait_engines(2)
            expected = [
                (await one.generate(tokens, GREEDY, strategy="data_parallel")).token_ids for tokens in PROMPTS
            ]
            load = Load([one, other])
            loop = asyncio.get_running_loop()
            for number in range(NUM_SWAPS):
                began = loop.time()
                version = await control.change("publish", "mine", source=source(number + 1))
                done = await control.applied(version, "mine", 5.0)
                assert (done.late, done.undone) == ([], "")
                assert len(done.routers) == 2
                applied.append(Applied(version, done.routers, [], "", loop.time() - began))
                load.acknowledged = version
            await load.stop()
            report = await everybody(control)
            assert report.state.version == applied[-1].version
            versions = set()
            for number, known, answer in load.answers:
                assert answer.reason == "length", answer.ended
                assert answer.token_ids == expected[number]
                assert answer.ended is not None
                versions.add(answer.ended.strategy_version)
                assert known <= answer.ended.strategy_version <= applied[-1].version or known == 0
            assert len(versions) > 1, "some requests met each other's versions"
            return applied, [answer for _, _, answer in load.answers]
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
