"""Swaps by the hundred while control messages are lost, doubled and reordered, in virtual time.

A thousand swaps in a virtual minute, under fifty requests a second; ``MICROSERVE_TEST_SWAPS`` sets others.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import Sequence
from types import ModuleType

import pytest

from microserve.protocol import log
from microserve.protocol.messages.strategy.control import PUBLISH, Change, Changed
from microserve.services.simulation.faults.judge import judge_answer, judge_rest
from microserve.services.simulation.faults.scenario import draw
from microserve.services.simulation.gateway import Answer
from microserve.services.simulation.journal import Journal
from microserve.services.simulation.loop import Process, VirtualLoop
from microserve.services.simulation.mesh import INDEX, Shape, SimulatedMesh
from microserve.services.simulation.network import Endpoint, Weather

NUM_SWAPS = int(os.environ.get("MICROSERVE_TEST_SWAPS", "1000"))
SEED = 0
SWAP_S = 0.06
REQUEST_S = 0.02
STORM = Weather(drop=0.2, duplicate=0.3, reorder=0.3, delay=0.3, max_delay_s=0.3)

SOURCE = """
import control_trace
from microserve.services.router.authoring import strategy

@strategy
async def mine(mesh, request):
    control_trace.began.append((request.request_id, NUMBER))
    BODY
        control_trace.served.append((request.request_id, NUMBER))
        yield tokens
"""
PLAIN = "async for tokens in mesh.pick(None, request).start_generate(request):"
SPLIT = """decode, prefill = mesh.pick(None, request), mesh.pick(None, request)
    grant = await decode.prep_recv(request, end=-1)
    sending = prefill.remote_send(request, grant, end=-1)
    async for tokens in decode.start_generate(request, begin=-1, after=sending):"""


def source(number: int) -> str:
    return SOURCE.replace("NUMBER", str(number)).replace("BODY", (PLAIN, SPLIT)[number % 2])


@pytest.mark.heavy
def test_every_swap_reaches_every_router_and_no_request_sees_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = ModuleType("control_trace")
    began: list[tuple[str, int]] = []
    served: list[tuple[str, int]] = []
    vars(trace).update(began=began, served=served)
    monkeypatch.setitem(sys.modules, "control_trace", trace)
    loop = VirtualLoop()
    journal = Journal(loop, keep=False)
    journal.open()
    try:
        answers, faults = loop.run(_run(loop, journal))
    finally:
        journal.close()

    assert journal.defects == []
    assert loop.failures == []
    wrong = [problem for answer in answers for problem in judge_answer(answer)]
    assert wrong == []
    assert {answer.outcome for answer in answers} <= {"length", "stop"}
    assert journal.events[log.REQUEST_CONTINUED] == 0, "no request was begun anew"
    assert sorted(request_id.partition("~")[0] for request_id, _ in began) == sorted(
        answer.request_id for answer in answers
    )
    assert set(served) == set(began), "each was served by what it began with"
    assert len({number for _, number in began}) > NUM_SWAPS / 4
    assert min(faults.values()) > NUM_SWAPS / 10
    with capsys.disabled():
        print(f"\n{NUM_SWAPS} swaps, {len(answers)} requests, {dict(faults)}")


async def _run(loop: VirtualLoop, journal: Journal) -> tuple[list[Answer], dict[str, int]]:
    shape = Shape(num_engines=2, num_routers=2, num_blocks=512, max_num_seqs=16, max_num_batched_tokens=64)
    mesh = SimulatedMesh(loop, SEED, shape, journal)
    answers: list[Answer] = []
    try:
        mesh.start_all()
        await asyncio.sleep(1.0)
        _publish(mesh, 0)
        await asyncio.sleep(1.0)
        _storm_over_control(mesh)
        swapping = asyncio.create_task(_swap(mesh))
        rng = random.Random(SEED)
        while not swapping.done():
            answers.append(_submit(mesh, rng, len(answers)))
            await asyncio.sleep(REQUEST_S)
        last = await swapping
        routers = [mesh.seats[name].service for name in mesh.routers]
        async with asyncio.timeout(30):
            while not all(answer.outcome for answer in answers):
                await asyncio.sleep(0.1)
            # Still in the storm: what is lost is sent again until it is acknowledged.
            while any(router.control.version < last for router in routers):
                await asyncio.sleep(0.1)
        assert {router.control.version for router in routers} == {last}
        assert {router.strategies.get("mine").version for router in routers} == {last}
        faults = dict(mesh.network.faults)
        mesh.network.weather = Weather()
        vars(mesh.network).pop("carry")
        await asyncio.sleep(2.0)
        assert judge_rest(mesh) == []
        return answers, faults
    finally:
        mesh.close()


def _storm_over_control(mesh: SimulatedMesh) -> None:
    """Between the index and the routers only."""
    network = mesh.network
    carry = network.carry

    def stormy(origin: Process, endpoint: Endpoint, frames: Sequence[bytes]) -> None:
        ends = {origin.name, endpoint.process.name}
        network.weather = STORM if INDEX in ends and ends & set(mesh.routers) else Weather()
        carry(origin, endpoint, frames)

    vars(network)["carry"] = stormy


async def _swap(mesh: SimulatedMesh) -> int:
    last = 0
    for number in range(1, NUM_SWAPS + 1):
        last = _publish(mesh, number)
        await asyncio.sleep(SWAP_S)
    return last


def _publish(mesh: SimulatedMesh, number: int) -> int:
    reply = mesh.seats[INDEX].service.control.answer(
        Change(number + 1, f"swap {number}", PUBLISH, "mine", source(number)), ""
    )
    assert isinstance(reply, Changed)
    return reply.version


def _submit(mesh: SimulatedMesh, rng: random.Random, number: int) -> Answer:
    template = draw(rng.randrange(40)).arrivals[0]
    answer = Answer(f"r-{number}", list(template.prompt), template.params, mesh.loop.now)
    answer.strategy = "mine"
    gateway = mesh.seats["gateway-0"].service
    gateway.submit(answer, mesh.address(rng.choice(mesh.routers)), ttl_s=30.0)
    return answer
