"""Hostile strategies on a live mesh: refused before they are published, or taken back by themselves.

Each is published as an operator would; then again without the dry run and well-behaved for its first
requests, so that only the routers can find it out. Clients go on asking all the time and see no error.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages.strategy.control import ROLLBACK, ControlRecord
from microserve.services.command.shared.control_client import ControlClient
from tests.support.bus.gateway_peer import Answer, BusClient
from tests.support.process.processes import MeshProcesses
from tests.support.router.swaps import GREEDY, PROMPTS

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

HEAD = """
import asyncio, time
from microserve.services.router.authoring import strategy

@strategy
async def mine(mesh, request):
    mesh.state["count"] = mesh.state.get("count", 0) + 1
    is_late = mesh.state["count"] > {after}
"""
SERVE = "    async for tokens in mesh.pick(None, request).start_generate(request):\n        yield tokens\n"
AT_EACH_AWAIT = """
    def fail(place):
        if is_late and mesh.state["count"] % 3 == place:
            raise ValueError(f"boo {{place}}")
    fail(0)
    grant = await mesh.pick(None, request).prep_recv(request, end=-1)
    fail(1)
    mesh.pick(None, request).remote_send(request, grant, end=-1)
    async for tokens in [e for e in mesh.engines() if e.id == grant.engine_id][0].start_generate(
        request, begin=-1, grant=grant
    ):
        fail(2)
        yield tokens
"""
HOSTILE = {
    "exception at each await": (HEAD + AT_EACH_AWAIT, "boo"),
    "infinite loop": (HEAD + "    while is_late: pass\n" + SERVE, "held the router"),
    "time.sleep": (HEAD + "    if is_late: time.sleep(5)\n" + SERVE, "time.sleep"),
    "wrong interval": (
        HEAD
        + "    begin = 10**6 if is_late else 0\n"
        + SERVE.replace("(request):", "(request, begin=begin):"),
        "InvalidInterval",
    ),
    "grant leak": (
        HEAD + "    if is_late: await mesh.pick(None, request).prep_recv(request)\n" + SERVE,
        "forgotten",
    ),
    "memory hog": (HEAD + "    if is_late: block = bytearray(1 << 43)\n" + SERVE, "MemoryError"),
    "wrong type": (HEAD + "    if is_late: yield 'tokens'\n" + SERVE, "not Tokens"),
    "missing module": ("import no_such_module\n" + HEAD + SERVE, "ModuleNotFoundError"),
    "syntax error": (HEAD + SERVE + "def\n", "SyntaxError"),
    "slow decision": (
        HEAD.replace("import asyncio, time", "import asyncio, time; now = time.perf_counter")
        + "    end = now() + 0.15 * is_late\n    while now() < end: pass\n"
        + SERVE,
        "too long at a time",
    ),
}
UNLOADABLE = {"missing module", "syntax error"}
PERIOD_S = 0.04
"""Between two requests."""


class Clients:
    """Ask for the strategy all the time; every answer is kept."""

    def __init__(self, clients: list[BusClient]) -> None:
        self.answers: list[tuple[int, Answer]] = []
        self._clients = clients
        self._running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        number = 0
        async with asyncio.TaskGroup() as tasks:
            while not self._stopped:
                tasks.create_task(self._ask(number))
                number += 1
                await asyncio.sleep(PERIOD_S)

    _stopped = False

    async def _ask(self, number: int) -> None:
        which = number % len(PROMPTS)
        client = self._clients[number % len(self._clients)]
        answer = await client.generate(PROMPTS[which], GREEDY, strategy="mine", ttl_s=60.0)
        self.answers.append((which, answer))

    async def stop(self) -> None:
        self._stopped = True
        await self._running


async def _publish(mesh: MeshProcesses, path: Path, *flags: str) -> tuple[int, str]:
    command = [sys.executable, "-P", "-m", "microserve.services", "strategy", "publish", str(path)]
    process = await asyncio.create_subprocess_exec(
        *command, "--name", "mine", "--index", mesh.index_address, *flags, stderr=subprocess.PIPE
    )
    _, err = await process.communicate()
    return process.returncode or 0, err.decode()


async def _taken_back(control: ControlClient, above: int) -> ControlRecord:
    async with asyncio.timeout(60):
        while True:
            for record in await control.history("mine", 4):
                if record.version > above and record.kind == ROLLBACK:
                    return record
            await asyncio.sleep(0.05)


async def _be_hostile(
    mesh: MeshProcesses, directory: Path
) -> tuple[dict[str, str], list[tuple[int, Answer]]]:
    bus, reasons = ZmqBus(linger_s=0.1), {}
    control = ControlClient(bus, mesh.index_address)
    path = directory / "mine.py"
    try:
        first, second = mesh.router_addresses.values()
        async with BusClient(bus, first) as one, BusClient(bus, second) as other:
            for client in (one, other):
                await client.wait_engines(2)
            path.write_text((HEAD + SERVE).format(after=0))
            assert (await _publish(mesh, path))[0] == 0
            clients = Clients([one, other])
            for name, (source, says) in HOSTILE.items():
                path.write_text(source.format(after=0))
                code, err = await _publish(mesh, path)
                assert code == 1, name
                assert says in err, (name, err)
                if name in UNLOADABLE:
                    reasons[name] = "refused"
                    continue
                before = (await control.report()).state.version
                path.write_text(source.format(after=20))
                await _publish(mesh, path, "--no-dry-run")
                record = await _taken_back(control, before)
                assert record.who.startswith("router ")
                reasons[name] = record.reason
            await clients.stop()
            expected = [
                (await one.generate(tokens, GREEDY, strategy="data_parallel")).token_ids for tokens in PROMPTS
            ]
            wrong = [(a.ended, name) for name, a in clients.answers if a.token_ids != expected[name]]
            assert wrong == []
            return reasons, clients.answers
    finally:
        control.close()
        bus.close()


@pytest.mark.heavy
def test_ten_hostile_strategies_hurt_nobody(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"index.control_path={tmp_path / 'control.db'}", "router.strategy_idle_s=2"]
    with MeshProcesses(tiny_model, tmp_path, num_routers=2, settings=settings) as mesh:
        reasons, answers = asyncio.run(_be_hostile(mesh, tmp_path))
    assert {answer.reason for _, answer in answers} == {"length"}
    assert all(reasons.values())
    with capsys.disabled():
        print(f"\n{len(answers)} requests, none failed, while these were published:")
        for name, reason in reasons.items():
            print(f"  {name}: {reason}")
