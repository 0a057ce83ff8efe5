"""The index asks engines for snapshots as a router without credit."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from microserve.protocol.bus.codec import ENGINE_REPLY
from microserve.protocol.bus.numbered import NumberedServer
from microserve.protocol.bus.transport import PeerHandler
from microserve.protocol.errors import DeadlineExceeded, Draining, EngineLost, InvalidRequest
from microserve.protocol.messages.engine import EngineInfo, EngineLoad, Failed, Heartbeat
from microserve.protocol.messages.kv_events import decode_batch
from microserve.services.index import engine_link
from microserve.services.index.engine_link import EngineLink
from tests.support.bus.lossy_bus import LossyBus
from tests.support.index.index_world import World, in_world

PROMPT = list(range(8))


def make_link(world: World, info: EngineInfo) -> EngineLink:
    link = EngineLink(world.bus, info, link_id="index-5", incarnation=5)
    world.at_end(link.close)
    return link


def test_snapshot_holds_what_the_engine_holds() -> None:
    async def test(world: World) -> None:
        engine = world.engine()
        engine.compute(PROMPT)
        link = make_link(world, engine.info)

        reply, bulk = await link.snapshot()

        assert (reply.epoch, reply.seq) == (engine.info.incarnation, 1)
        [stored] = decode_batch(bulk).events
        assert getattr(stored, "token_ids", None) == PROMPT

    in_world(test)


def test_ping_keeps_an_open_link_alive_and_says_nothing_before() -> None:
    async def test(world: World) -> None:
        engine = world.engine()
        link = make_link(world, engine.info)
        link.ping()
        await link.snapshot()
        assert engine.pings == []

        link.ping()

        await world.until(lambda: engine.pings == [5])

    in_world(test)


def test_refusal_is_raised_and_the_next_attempt_starts_afresh() -> None:
    async def test(world: World) -> None:
        engine = world.engine()
        link = make_link(world, engine.info)
        engine.refuse_snapshots = True
        with pytest.raises(Draining):
            await link.snapshot()

        engine.refuse_snapshots = False
        engine.forget_peers()

        await link.snapshot()

    in_world(test)


def test_engine_that_forgot_us_is_greeted_again() -> None:
    async def test(world: World) -> None:
        engine = world.engine()
        link = make_link(world, engine.info)
        await link.snapshot()
        engine.forget_peers()

        with pytest.raises(Draining):
            await link.snapshot()
        await link.snapshot()

    in_world(test)


def test_another_engine_at_the_address_is_not_believed() -> None:
    async def test(world: World) -> None:
        engine = world.engine("e2", incarnation=12)
        stale = msgspec.structs.replace(engine.info, engine_id="e1", incarnation=11)
        link = make_link(world, stale)

        with pytest.raises(EngineLost, match="now life 12 of e2"):
            await link.snapshot()

    in_world(test)


def test_absent_engine_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_link, "HELLO_TIMEOUT_S", 0.05)

    async def test(world: World) -> None:
        engine = world.engine()
        engine.close()
        link = make_link(world, engine.info)

        # Its socket is closed in the background: the link may still have met it.
        with pytest.raises((DeadlineExceeded, EngineLost)):
            await link.snapshot()

    in_world(test)


def test_junk_and_unanswerable_failures() -> None:
    async def test(world: World) -> None:
        def answer(peer: bytes, frames: list[bytes]) -> None:
            server.send(peer, [b"junk"])
            server.send(peer, ENGINE_REPLY.encode(Failed(0, "invalid_request", "could not read that")))

        server = world.bus.server("tcp://127.0.0.1:0", answer)
        info = msgspec.structs.replace(world.engine().info, address=server.address)
        link = make_link(world, info)

        with pytest.raises(InvalidRequest, match="could not read that"):
            await link.snapshot()

    in_world(test)


def test_closing_ends_whoever_waits() -> None:
    async def test(world: World) -> None:
        server = world.bus.server("tcp://127.0.0.1:0", lambda peer, frames: link.close())
        info = msgspec.structs.replace(world.engine().info, address=server.address)
        link = make_link(world, info)

        with pytest.raises(EngineLost, match="was closed"):
            await link.snapshot()

    in_world(test)


def test_a_lost_answer_ends_the_snapshot_with_the_next_message() -> None:
    async def test(world: World) -> None:
        engine = world.engine()
        lossy = LossyBus(world.bus)
        server = NumberedServer(lossy, "tcp://127.0.0.1:0", answer_of(lambda: server), lambda peer: None)
        world.at_end(server.close)
        link = make_link(world, msgspec.structs.replace(engine.info, address=server.address))
        lossy.swallow_down = {1}

        with pytest.raises(EngineLost, match="messages were lost"):
            await link.snapshot()

    in_world(test)


def test_an_engine_that_closes_ends_the_snapshot() -> None:
    async def test(world: World) -> None:
        engine = world.engine()

        def vanish(peer: bytes, frames: list[bytes]) -> None:
            server.close()

        server = world.bus.server("tcp://127.0.0.1:0", vanish)
        link = make_link(world, msgspec.structs.replace(engine.info, address=server.address))

        with pytest.raises(EngineLost, match="the connection was closed"):
            await link.snapshot()

    in_world(test)


def answer_of(server: Callable[[], NumberedServer]) -> PeerHandler:
    """Two messages for each, of which the first is to be lost."""

    def answer(peer: bytes, frames: list[bytes]) -> None:
        for _ in range(2):
            server().send(peer, ENGINE_REPLY.encode(Heartbeat(1, EngineLoad())))

    return answer
