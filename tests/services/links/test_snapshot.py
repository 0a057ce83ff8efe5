"""A reader of snapshots is a peer without credit, and leaves nothing open."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import pytest

from microserve.protocol.bus.codec import ENGINE_REPLY, ENGINE_REQUEST
from microserve.protocol.bus.numbered import NumberedServer
from microserve.protocol.bus.transport import Bus, PeerHandler
from microserve.protocol.errors import DeadlineExceeded, Draining, EngineLost
from microserve.protocol.messages.engine import (
    EngineInfo,
    EngineLoad,
    Failed,
    Heartbeat,
    Hello,
    SnapshotReply,
)
from microserve.protocol.messages.kv.kv_decoding import decode_batch
from microserve.protocol.settings.settings import BusSettings
from microserve.services.links.engine import RouterIdentity
from microserve.services.links.snapshot import read_snapshot
from tests.support.bus.lossy_bus import LossyBus
from tests.support.index.index_world import World, in_world

PROMPT = list(range(8))


async def read(bus: Bus, info: EngineInfo, *, silence_s: float = 1.5) -> tuple[SnapshotReply, bytes]:
    settings = BusSettings(heartbeat_interval_s=silence_s / 6, liveness=6)
    return await read_snapshot(bus, info, RouterIdentity("index-5", 5), settings)


def served_by(world: World, answer: PeerHandler) -> EngineInfo:
    server = world.bus.server("tcp://127.0.0.1:0", answer)
    return msgspec.structs.replace(world.engine().info, address=server.address)


def test_snapshot_holds_what_the_engine_holds() -> None:
    async def test(world: World) -> None:
        engine = world.engine()
        engine.compute(PROMPT)

        reply, bulk = await read(world.bus, engine.info)

        assert (reply.epoch, reply.seq) == (engine.info.incarnation, 2)
        [stored] = decode_batch(bulk).events
        assert getattr(stored, "token_ids", None) == PROMPT
        assert engine.pings == []

    in_world(test)


def test_a_reader_opens_no_window() -> None:
    async def test(world: World) -> None:
        hellos: list[Hello] = []

        def answer(peer: bytes, frames: list[bytes]) -> None:
            message, _ = ENGINE_REQUEST.decode([frames[0][:2], *frames[1:]])
            assert isinstance(message, Hello)
            hellos.append(message)
            server.send(peer, ENGINE_REPLY.encode(Failed(message.call_id, "draining", "not now")))

        server = world.bus.server("tcp://127.0.0.1:0", answer)
        info = msgspec.structs.replace(world.engine().info, address=server.address)
        with pytest.raises(Draining):
            await read(world.bus, info)

        assert [(hello.router_id, hello.incarnation, hello.credit) for hello in hellos] == [("index-5", 5, 0)]

    in_world(test)


def test_refusal_is_raised_and_the_next_attempt_starts_afresh() -> None:
    async def test(world: World) -> None:
        engine = world.engine()
        engine.refuse_snapshots = True
        with pytest.raises(Draining):
            await read(world.bus, engine.info)

        engine.refuse_snapshots = False
        engine.forget_peers()

        await read(world.bus, engine.info)
        await read(world.bus, engine.info)
        assert engine.num_snapshots == 2

    in_world(test)


def test_another_engine_at_the_address_is_not_believed() -> None:
    async def test(world: World) -> None:
        engine = world.engine("e2", incarnation=12)
        stale = msgspec.structs.replace(engine.info, engine_id="e1", incarnation=11)

        with pytest.raises(EngineLost, match="another life of e1"):
            await read(world.bus, stale)

    in_world(test)


@pytest.mark.slow
def test_absent_engine_is_an_error() -> None:
    async def test(world: World) -> None:
        engine = world.engine()
        engine.close()

        # Its socket is closed in the background: the reader may still have met it.
        with pytest.raises((DeadlineExceeded, EngineLost)):
            await read(world.bus, engine.info, silence_s=0.06)

    in_world(test)


def test_an_address_that_cannot_be_one_is_said_at_once() -> None:
    async def test(world: World) -> None:
        with pytest.raises(OSError, match="cannot connect"):
            await read(world.bus, msgspec.structs.replace(world.engine().info, address="nowhere"))

    in_world(test)


def test_junk_is_dropped_and_a_failure_of_no_call_ends_the_attempt() -> None:
    async def test(world: World) -> None:
        def answer(peer: bytes, frames: list[bytes]) -> None:
            server.send(peer, [b"junk"])
            server.send(peer, ENGINE_REPLY.encode(Failed(0, "invalid_request", "could not read that")))

        server = world.bus.server("tcp://127.0.0.1:0", answer)
        info = msgspec.structs.replace(world.engine().info, address=server.address)

        with pytest.raises(EngineLost, match="could not read that"):
            await read(world.bus, info)

    in_world(test)


def test_who_gives_up_leaves_no_socket_and_no_task() -> None:
    async def test(world: World) -> None:
        asked = asyncio.Event()
        info = served_by(world, lambda peer, frames: asked.set())
        num_sockets = len(world.bus.sockets)
        reading = asyncio.create_task(read(world.bus, info))
        await asked.wait()

        reading.cancel()
        await asyncio.wait([reading])

        assert len(world.bus.sockets) == num_sockets
        assert asyncio.all_tasks() == {asyncio.current_task()}

    in_world(test)


def test_a_lost_answer_ends_the_snapshot_with_the_next_message() -> None:
    async def test(world: World) -> None:
        engine = world.engine()
        lossy = LossyBus(world.bus)
        server = NumberedServer(lossy, "tcp://127.0.0.1:0", answer_of(lambda: server), lambda peer: None)
        world.at_end(server.close)
        lossy.swallow_down = {1}

        with pytest.raises(EngineLost, match="messages were lost"):
            await read(world.bus, msgspec.structs.replace(engine.info, address=server.address))

    in_world(test)


def test_an_engine_that_closes_ends_the_snapshot() -> None:
    async def test(world: World) -> None:
        engine = world.engine()

        def vanish(peer: bytes, frames: list[bytes]) -> None:
            server.close()

        server = world.bus.server("tcp://127.0.0.1:0", vanish)

        with pytest.raises(EngineLost, match="closed the connection"):
            await read(world.bus, msgspec.structs.replace(engine.info, address=server.address))

    in_world(test)


def answer_of(server: Callable[[], NumberedServer]) -> PeerHandler:
    """Two messages for each, of which the first is to be lost."""

    def answer(peer: bytes, frames: list[bytes]) -> None:
        for _ in range(2):
            server().send(peer, ENGINE_REPLY.encode(Heartbeat(1, EngineLoad())))

    return answer
