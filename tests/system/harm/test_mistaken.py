"""Every mistake of docs/authoring.md on a live mesh, published without its dry run: whoever asks for another
strategy notices nothing, and even those that ask for it are answered.

Two routers serve a steady load of ``data_parallel`` all the time; each mistaken strategy gets requests of its
own for a while, some of whose clients leave, and is then taken away.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages.strategy.control import PUBLISH, RETIRE
from microserve.services.command.shared.control_client import ControlClient
from tests.support.bus.gateway_peer import Answer, BusClient
from tests.support.process.processes import MeshProcesses
from tests.support.router.mistaken_strategies import SAMPLES
from tests.support.router.swaps import GREEDY, PROMPTS

pytestmark = [pytest.mark.system, pytest.mark.heavy, pytest.mark.timeout(900)]

PERIOD_S = 0.05
"""Between two requests of those that want nothing of it."""
NUM_MISTAKEN = 6
"""Requests of each mistaken strategy."""
NUM_BESIDE = 15
"""Answers to others that come while it is in force, at least."""


class Others:
    """Ask for ``data_parallel`` all the time, at both routers in turn."""

    def __init__(self, clients: list[BusClient]) -> None:
        self.answers: list[tuple[int, Answer]] = []
        self._came = asyncio.Condition()
        self._clients = clients
        self._is_over = False
        self._running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        number = 0
        async with asyncio.TaskGroup() as tasks:
            while not self._is_over:
                tasks.create_task(self._ask(number))
                number += 1
                await asyncio.sleep(PERIOD_S)

    async def _ask(self, number: int) -> None:
        which, client = number % len(PROMPTS), self._clients[number % len(self._clients)]
        answer = await client.generate(PROMPTS[which], GREEDY, strategy="data_parallel", ttl_s=30.0)
        async with self._came:
            self.answers.append((which, answer))
            self._came.notify_all()

    async def more(self, count: int) -> None:
        """Wait until so many more have been answered."""
        wanted = len(self.answers) + count
        async with self._came:
            await self._came.wait_for(lambda: len(self.answers) >= wanted)

    async def stop(self) -> None:
        self._is_over = True
        await self._running


async def _make_all_mistakes(mesh: MeshProcesses) -> tuple[list[str], int, dict[str, list[str]]]:
    """What went wrong for others, how many of them asked, and how those of each mistake were answered."""
    bus = ZmqBus(linger_s=0.1)
    control = ControlClient(bus, mesh.index_address)
    wrong: list[str] = []
    own: dict[str, list[str]] = {}
    try:
        first, second = mesh.router_addresses.values()
        async with BusClient(bus, first) as one, BusClient(bus, second) as other:
            for client in (one, other):
                await client.wait_engines(2)
            expected = [
                (await one.generate(tokens, GREEDY, strategy="data_parallel")).token_ids for tokens in PROMPTS
            ]
            others = Others([one, other])
            for name, sample in SAMPLES.items():
                begin = len(others.answers)
                version = await control.change(PUBLISH, "mine", source=sample.source, reason=name)
                await control.applied(version, "mine", 10.0)
                asking = [
                    (one, other)[number % 2].generate(
                        PROMPTS[number % len(PROMPTS)], GREEDY, strategy="mine", ttl_s=30.0
                    )
                    for number in range(NUM_MISTAKEN)
                ]
                answers, _ = await asyncio.gather(asyncio.gather(*asking), others.more(NUM_BESIDE))
                own[name] = [answer.reason for answer in answers]
                wrong += [
                    f"{name}: its own client: {answer.ended}"
                    for number, answer in enumerate(answers)
                    if answer.token_ids != expected[number % len(PROMPTS)]
                ]
                await control.change(RETIRE, "mine", reason=name)
                seen = others.answers[begin:]
                wrong += [
                    f"{name}: {answer.ended}" for which, answer in seen if answer.token_ids != expected[which]
                ]
            await others.stop()
            return wrong, len(others.answers), own
    finally:
        control.close()
        bus.close()


def test_nobody_else_notices_a_mistake(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"index.control_path={tmp_path / 'control.db'}", "router.strategy_idle_s=2"]
    with MeshProcesses(tiny_model, tmp_path, num_routers=2, settings=settings) as mesh:
        wrong, num_others, own = asyncio.run(_make_all_mistakes(mesh))
        ended = [service.name for service in mesh.history if service.process.poll() is not None]
    assert (wrong, ended) == ([], [])
    assert num_others >= NUM_BESIDE * len(SAMPLES)
    assert {reason for reasons in own.values() for reason in reasons} == {"length"}
    with capsys.disabled():
        print(f"\n{num_others} requests of others, none failed, beside {len(own)} mistaken strategies")
