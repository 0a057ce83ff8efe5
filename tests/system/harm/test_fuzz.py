"""Frames that break WIRE.md, 100,000 of them on every socket of every service: each serves on afterwards."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from microserve.protocol.bus.codec import ENGINE_REQUEST, INDEX_REPLY, INDEX_REQUEST, ROUTER_REQUEST, Codec
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages import engine as actions
from microserve.protocol.messages import index as membership
from microserve.protocol.messages import router as serving
from microserve.protocol.messages.kv.grant import Grant, HeapAddress
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.bus.gateway_peer import BusClient
from tests.support.bus.junk import junk
from tests.support.engine.engine_client import EngineClient
from tests.support.process.processes import MeshProcesses

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

COUNT = 100_000
GRANT = Grant("e/5/0/1", "e", 5, 0, 1, 0, 8, [1, 2], 16, "x", HeapAddress("shm", "h", 1, 2, 3, 5), 1.0)
PARAMS = SamplingParams(max_tokens=3)
LOAD = actions.EngineLoad()
INFO = actions.EngineInfo(
    "ghost",
    3,
    "tcp://127.0.0.1:1",
    "tcp://127.0.0.1:1",
    "tcp://127.0.0.1:1",
    "m",
    [],
    16,
    4,
    2,
    99,
    9,
    [1],
    "x",
    "shm",
    1,
)

SOCKETS: dict[str, tuple[Codec[Any], list[Any]]] = {
    "engine": (
        ENGINE_REQUEST,
        [
            actions.Hello(1, "fuzz", 1, 4),
            actions.PrepRecv(2, "r", -1, 3.0),
            actions.RemoteSend(3, "r", 0, 8, GRANT, 0, 3.0, PARAMS),
            actions.StartGenerate(4, "r", 0, PARAMS, 3.0),
            actions.Commit(5, "r", "g", 3.0),
            actions.Abort(6, "r"),
            actions.Release(7, "r", "g"),
            actions.Stats(8),
            actions.Snapshot(9),
            actions.Ping(1),
            actions.Credit(5),
        ],
    ),
    "router": (
        ROUTER_REQUEST,
        [
            serving.GatewayHello("fuzz", 1, 4),
            serving.Generate("r", "tiny", PARAMS, 2.0),
            serving.Cancel("r"),
            serving.GatewayPing(1),
            serving.StreamCredit(3),
        ],
    ),
    "index": (
        INDEX_REQUEST,
        [
            membership.Beat("ghost", 3, LOAD),
            membership.Deregister("ghost", 3),
            membership.Watch("w"),
            membership.Lookup(2),
            membership.IndexStats(3),
        ],
    ),
    "replay": (ENGINE_REQUEST, [actions.Stats(1)]),
}


@pytest.fixture(scope="module")
def mesh(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with MeshProcesses(tiny_model, tmp_path_factory.mktemp("fuzz")) as mesh:
        yield mesh


@pytest.mark.parametrize("name", list(SOCKETS))
def test_socket(name: str, mesh: MeshProcesses) -> None:
    asyncio.run(_fuzz(name, mesh))


async def _fuzz(name: str, mesh: MeshProcesses) -> None:
    bus = ZmqBus(linger_s=0.0)
    codec, messages = SOCKETS[name]
    encoded = [codec.encode(message) for message in messages]
    try:
        async with EngineClient(bus, mesh.services["engine-0"].address) as engine:
            assert engine.info is not None
            addresses = {
                "engine": engine.info.address,
                "replay": engine.info.replay_address,
                "router": mesh.router_address,
                "index": mesh.index_address,
            }
            answered = 0

            def receive(_: list[bytes]) -> None:
                nonlocal answered
                answered += 1

            sockets = [bus.client(addresses[name], receive) for _ in range(4)]
            # Two of the four have been let in before they misbehave.
            for socket in sockets[:2]:
                socket.send(encoded[0])
            frames = junk(
                random.Random(name).randrange(1 << 30), encoded[0][0], [e[1] for e in encoded], COUNT
            )
            for number, message in enumerate(frames):
                while not sockets[number % 4].send(message):
                    await asyncio.sleep(0.001)  # our own high-water mark: let the service catch up
                if number % 200 == 0:
                    await asyncio.sleep(0)
            await _still_serves(bus, mesh, engine)
            if name != "replay":
                assert answered > 0
            for socket in sockets:
                socket.close()
        assert all(service.process.poll() is None for service in mesh.services.values())
    finally:
        bus.close()


async def _still_serves(bus: ZmqBus, mesh: MeshProcesses, engine: EngineClient) -> None:
    """A request is answered, the index answers, and what the junk began ends with its deadline."""
    async with BusClient(bus, mesh.router_address) as client:
        await client.wait_engines(2, timeout_s=90.0)
        answer = await client.generate(list(range(20, 80)), SamplingParams(max_tokens=4, ignore_eos=True))
        assert answer.reason == "length", answer.ended
    reports: asyncio.Queue[membership.IndexReply] = asyncio.Queue()
    index = bus.client(mesh.index_address, lambda frames: reports.put_nowait(INDEX_REPLY.decode(frames)[0]))
    index.send(INDEX_REQUEST.encode(membership.IndexStats(7)))
    async with asyncio.timeout(60):
        while not isinstance(await reports.get(), membership.IndexReport):
            pass
    index.close()
    async with asyncio.timeout(60):
        while True:
            load = (await engine.stats()).load
            if load.num_running == load.num_waiting == load.num_grants == load.quarantined_blocks == 0:
                break
            await asyncio.sleep(0.1)
    assert engine.info is not None
    assert load.free_blocks == engine.info.num_blocks
