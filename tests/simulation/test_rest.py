"""A mesh at rest in virtual time: it says little, loses nobody by that, and is awake as soon as it is asked.

What goes wrong while nobody asks is found at the first request: within the silence that is allowed at work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from microserve.protocol import log
from microserve.protocol.bus.codec import ROUTER_REQUEST
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.messages.router import GatewayHello, GatewayPing
from microserve.services.router.service import Router
from microserve.services.simulation.bus import SimBus
from microserve.services.simulation.faults.judge import judge_answer, judge_rest
from microserve.services.simulation.gateway import Answer
from microserve.services.simulation.journal import Journal
from microserve.services.simulation.loop import Process, VirtualLoop
from microserve.services.simulation.mesh import INDEX, Shape, SimulatedMesh, until

REST_S = 10.0
"""From the start until everybody is idle, and long enough for some signs of life since."""
SILENCE_S = Shape.heartbeat_s * Shape.liveness
AWAKE_S = 0.5
"""Between two signs of life at work."""
Test = Callable[[SimulatedMesh], Awaitable[None]]


def in_mesh(shape: Shape, test: Test) -> Journal:
    """``test`` begins when the mesh is at rest; what was said meanwhile."""
    loop = VirtualLoop()
    journal = Journal(loop, keep=False)
    journal.open()

    async def run() -> None:
        mesh = SimulatedMesh(loop, 0, shape, journal)
        try:
            mesh.start_all()
            await asyncio.sleep(REST_S)
            await test(mesh)
        finally:
            mesh.close()

    try:
        loop.run(run())
    finally:
        journal.close()
    assert (journal.defects, loop.failures) == ([], [])
    return journal


def submit(mesh: SimulatedMesh, name: str) -> Answer:
    answer = Answer(name, [5, 6, 7, 8, 9], SamplingParams(max_tokens=4, temperature=0.0), mesh.loop.now)
    answer.strategy = "data_parallel"
    mesh.seats["gateway-0"].service.submit(answer, mesh.address("router-0"), ttl_s=30.0)
    return answer


async def whole(*answers: Answer) -> None:
    async with asyncio.timeout(60):
        while not all(answer.outcome for answer in answers):
            await asyncio.sleep(0.01)
    assert [answer.outcome for answer in answers] == ["length"] * len(answers)
    assert [problem for answer in answers for problem in judge_answer(answer)] == []


def engines(mesh: SimulatedMesh) -> list[str]:
    router: Router = mesh.seats["router-0"].service
    return sorted(each.engine_id for each in router.registry.joined())


async def messages_per_s(mesh: SimulatedMesh, seconds: float) -> float:
    before = mesh.network.num_carried
    await asyncio.sleep(seconds)
    return (mesh.network.num_carried - before) / seconds


def test_at_rest_a_mesh_says_a_quarter_and_loses_nobody() -> None:
    async def rest(mesh: SimulatedMesh) -> None:
        idle = await messages_per_s(mesh, 200.0)
        await whole(submit(mesh, "r"))
        # It is awake for twice the silence that is allowed.
        awake = await messages_per_s(mesh, 2 * SILENCE_S)
        assert idle < 0.3 * awake
        await asyncio.sleep(REST_S)
        assert await messages_per_s(mesh, 20.0) == pytest.approx(idle, rel=0.1)
        assert judge_rest(mesh) == []

    journal = in_mesh(Shape(), rest)
    assert not {log.ENGINE_LOST, log.ROUTER_LOST, log.GATEWAY_LOST, log.INDEX_LOST} & set(journal.events)
    assert journal.events[log.ENGINE_JOINED] == 4  # each engine, at the index and at the router


@pytest.mark.parametrize("after_s", [0.0, 0.7, 1.6, 3.1, 5.5])
@pytest.mark.parametrize("fault", ["freeze", "deaf", "dumb"])
def test_an_engine_that_failed_at_rest_costs_the_first_requests_one_silence(
    fault: str, after_s: float
) -> None:
    async def fail(mesh: SimulatedMesh) -> None:
        if fault == "freeze":
            process = mesh.seats["engine-0"].process
            assert process is not None
            process.freeze()
        else:
            way = ("router-0", "engine-0") if fault == "deaf" else ("engine-0", "router-0")
            mesh.network.block(*way, lossy=True)
        await asyncio.sleep(after_s)
        answers = [submit(mesh, f"r{number}") for number in range(6)]
        await whole(*answers)
        waited_s = max(answer.ended_at - answer.submitted_at for answer in answers)
        assert waited_s < SILENCE_S + AWAKE_S
        await until(lambda: engines(mesh) == ["engine-1"], 0.0)
        assert engines(mesh) == ["engine-1"]

    in_mesh(Shape(), fail)


def test_a_gateway_that_comes_at_rest_hears_of_the_router_as_soon_as_any() -> None:
    """It may be idle itself from its welcome on: what it is told then is all that it goes by."""

    async def come(mesh: SimulatedMesh) -> None:
        heard: list[float] = []
        bus = SimBus(mesh.addresses, Process(mesh.loop, "another gateway"))
        for number in range(8):  # wherever in its rest the router is
            await asyncio.sleep(0.23)
            heard.clear()
            socket = bus.client(mesh.address("router-0"), lambda frames: heard.append(mesh.loop.now))
            socket.send(ROUTER_REQUEST.encode(GatewayHello(f"another-{number}", 1, 64)))
            await until(lambda: len(heard) > 0, 1.0)
            socket.send(ROUTER_REQUEST.encode(GatewayPing(1, 2.0)))
            began = mesh.loop.now
            await until(lambda: len(heard) > 1, 10.0, 0.01)
            assert heard[1] - began <= 2 * AWAKE_S
            socket.close()
            await asyncio.sleep(REST_S)

    in_mesh(Shape(), come)


@pytest.mark.parametrize("fresh", [INDEX, "router-0"])
def test_what_restarts_at_rest_is_back_with_all_that_it_had(fresh: str) -> None:
    async def restart(mesh: SimulatedMesh) -> None:
        mesh.kill(fresh)
        mesh.start(fresh)
        await asyncio.sleep(4.0)
        assert engines(mesh) == mesh.engines
        assert len(mesh.seats[INDEX].service._membership) == len(mesh.engines)
        await whole(submit(mesh, "r"))

    journal = in_mesh(Shape(), restart)
    assert log.ENGINE_LOST not in journal.events


@pytest.mark.parametrize("after_s", [0.1, 2.0, 5.5])
def test_a_router_that_froze_at_rest_costs_the_first_request_one_silence(after_s: float) -> None:
    async def fail(mesh: SimulatedMesh) -> None:
        process = mesh.seats["router-0"].process
        assert process is not None
        process.freeze()
        await asyncio.sleep(after_s)
        answer = submit(mesh, "r")
        await whole(answer)
        # The gateway looks at the next tick after it.
        assert answer.ended_at - answer.submitted_at < SILENCE_S + 2 * AWAKE_S

    in_mesh(Shape(num_routers=2), fail)


def test_an_engine_that_dies_at_rest_is_missed_at_once_and_back_at_once() -> None:
    async def kill(mesh: SimulatedMesh) -> None:
        mesh.kill("engine-0")
        await asyncio.sleep(0.01)
        assert engines(mesh) == ["engine-1"]
        mesh.start("engine-0")
        await until(lambda: len(engines(mesh)) == 2, AWAKE_S, 0.01)
        assert engines(mesh) == ["engine-0", "engine-1"]
        # The gateway is told of it, and does not wait for the next sign of life.
        client = mesh.seats["gateway-0"].service.routers
        await until(lambda: client.links[0].num_engines == 2, AWAKE_S, 0.01)
        assert client.links[0].num_engines == 2

    in_mesh(Shape(), kill)


def test_an_engine_that_froze_at_rest_is_missed_though_nobody_asks() -> None:
    async def fail(mesh: SimulatedMesh) -> None:
        process = mesh.seats["engine-0"].process
        assert process is not None
        process.freeze()
        await until(lambda: engines(mesh) == ["engine-1"], 10.0)
        assert engines(mesh) == ["engine-1"]
        await until(lambda: len(mesh.seats[INDEX].service._membership) == 1, 5.0)
        assert len(mesh.seats[INDEX].service._membership) == 1
        process.thaw()
        await until(lambda: len(engines(mesh)) == 2, 5.0)
        assert engines(mesh) == ["engine-0", "engine-1"]

    in_mesh(Shape(), fail)


def test_a_process_that_stood_still_at_rest_has_lost_nobody_when_it_goes_on() -> None:
    async def stall(mesh: SimulatedMesh) -> None:
        names = [INDEX, *mesh.engines, *mesh.routers, *mesh.gateways]
        processes = [process for name in names if (process := mesh.seats[name].process) is not None]
        for process in processes:
            process.freeze()
        await asyncio.sleep(60.0)
        for process in processes:
            process.thaw()
        await asyncio.sleep(1.0)
        await whole(submit(mesh, "r"))
        assert engines(mesh) == mesh.engines

    journal = in_mesh(Shape(), stall)
    assert not {log.ENGINE_LOST, log.ROUTER_LOST, log.GATEWAY_LOST} & set(journal.events)
