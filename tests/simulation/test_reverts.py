"""A version that is bad in service is taken back by itself, everywhere, and no client sees an error."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from microserve.protocol.messages.strategy.control import (
    PUBLISH,
    Change,
    Changed,
    ControlHistory,
    ControlRecord,
    ControlRecords,
)
from microserve.services.simulation.faults.judge import judge_answer, judge_rest
from microserve.services.simulation.faults.scenario import draw
from microserve.services.simulation.gateway import Answer
from microserve.services.simulation.journal import Journal
from microserve.services.simulation.loop import VirtualLoop
from microserve.services.simulation.mesh import INDEX, Shape, SimulatedMesh
from tests.support.router.hostile_strategies import GOOD, HEAD, HOSTILE, SERVE

REQUEST_S = 0.02
UNLOADABLE = {"import": "import no_such_module\n" + GOOD, "syntax": GOOD + "def\n", "type": GOOD + "1 + ''\n"}
BAD = {name: source for name, (source, _) in HOSTILE.items() if name != "spins"} | UNLOADABLE
"""What spins stops the clock that is virtual; test_held_router.py has it by the real one."""
SLOW = HEAD + "    await asyncio.sleep(0.3)\n" + SERVE


class Rig:
    """One engine, two routers, requests by turns."""

    def __init__(self, loop: VirtualLoop, journal: Journal) -> None:
        shape = Shape(
            num_engines=2, num_routers=2, num_blocks=512, max_num_seqs=16, max_num_batched_tokens=64
        )
        self.mesh = SimulatedMesh(loop, 3, shape, journal)
        self.answers: list[Answer] = []

    def publish(self, source: str, share: float = 1.0) -> int:
        change = Change(1, f"change {hash((source, share))}", PUBLISH, "mine", source, share=share)
        reply = self.mesh.seats[INDEX].service.control.answer(change, "")
        assert isinstance(reply, Changed)
        return reply.version

    def history(self) -> list[ControlRecord]:
        reply = self.mesh.seats[INDEX].service.control.answer(ControlHistory(1), "")
        assert isinstance(reply, ControlRecords)
        return reply.records

    def in_force(self) -> set[int]:
        """Versions of the strategy, on all routers."""
        books = [self.mesh.seats[name].service.strategies for name in self.mesh.routers]
        found = [(book.published["mine"].stable, book.published["mine"].canary) for book in books]
        return {each.version for pair in found for each in pair if each is not None}

    async def serve(self, seconds: float) -> None:
        mesh = self.mesh
        for _ in range(round(seconds / REQUEST_S)):
            number = len(self.answers)
            template = draw(number % 40).arrivals[0]
            answer = Answer(f"r-{number}", list(template.prompt), template.params, mesh.loop.now)
            answer.strategy = "mine"
            self.answers.append(answer)
            address = mesh.address(mesh.routers[number % 2])
            mesh.seats["gateway-0"].service.submit(answer, address, ttl_s=30.0)
            await asyncio.sleep(REQUEST_S)

    async def settle(self) -> None:
        async with asyncio.timeout(30):
            while not all(answer.outcome for answer in self.answers):
                await asyncio.sleep(0.1)
        await asyncio.sleep(2.0)


async def _run(rig: Rig, source: str, share: float, serve_s: float) -> tuple[set[int], list[ControlRecord]]:
    try:
        rig.mesh.start_all()
        await asyncio.sleep(1.0)
        rig.publish(GOOD)
        await asyncio.sleep(0.1)  # until the routers have it
        await rig.serve(1.0)
        rig.publish(source, share)
        await rig.serve(serve_s)
        await rig.settle()
        assert judge_rest(rig.mesh) == []
        return rig.in_force(), rig.history()
    finally:
        rig.mesh.close()


def run(source: str, share: float, serve_s: float) -> tuple[set[int], list[ControlRecord], Sequence[Answer]]:
    loop = VirtualLoop()
    journal = Journal(loop, keep=False)
    rig = Rig(loop, journal)
    journal.open()
    try:
        in_force, history = loop.run(_run(rig, source, share, serve_s))
    finally:
        journal.close()
    assert loop.failures == []
    return in_force, history, rig.answers


@pytest.mark.parametrize("name", BAD)
def test_a_bad_version_is_taken_back_and_no_client_sees_an_error(name: str) -> None:
    in_force, history, answers = run(BAD[name], 1.0, 2.0)
    assert in_force == {1}
    assert [(record.version, record.kind) for record in history] == [
        (3, "rollback"),
        (2, "publish"),
        (1, "publish"),
    ]
    assert history[0].who.startswith("router router-")
    assert history[0].reason
    assert {answer.outcome for answer in answers} <= {"length", "stop"}
    assert [problem for answer in answers for problem in judge_answer(answer)] == []


def test_a_slow_canary_is_taken_back_within_its_window(capsys: pytest.CaptureFixture[str]) -> None:
    in_force, history, answers = run(SLOW, 0.1, 16.0)
    assert in_force == {1}
    assert history[0].kind == "rollback"
    assert "TTFT" in history[0].reason
    assert {answer.outcome for answer in answers} <= {"length", "stop"}
    with capsys.disabled():
        print(f"\nslow canary of 10 %: {history[0].reason}")


def test_a_good_canary_stays(capsys: pytest.CaptureFixture[str]) -> None:
    in_force, history, _ = run(GOOD + "\n", 0.1, 16.0)
    assert in_force == {1, 2}
    assert [record.kind for record in history] == ["publish", "publish"]
