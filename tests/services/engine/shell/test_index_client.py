"""An engine stays a member through every loss, and does not need the index."""

from __future__ import annotations

import asyncio

import structlog

from microserve.protocol import log
from microserve.protocol.bus.codec import INDEX_REPLY, INDEX_REQUEST
from microserve.protocol.messages.engine import EngineLoad
from microserve.protocol.messages.index import (
    Beat,
    Deregister,
    IndexFailed,
    IndexReply,
    IndexRequest,
    Register,
    Registered,
    Unknown,
)
from microserve.services.engine.shell.index_client import IndexClient
from tests.support.index.index_world import ANY, World, in_world, make_info

INFO = make_info("e1", 11)


class Index:
    """One life of an index that answers as it is told."""

    def __init__(self, world: World, incarnation: int, address: str = ANY) -> None:
        self._incarnation = incarnation
        self.received: list[IndexRequest] = []
        self.answer = True
        self.refuse = False
        self._peer = b""
        self._socket = world.bus.server(address, self._on_frames)
        self.address = self._socket.address
        world.at_end(self.close)

    def _on_frames(self, peer: bytes, frames: list[bytes]) -> None:
        self._peer = peer
        message, _ = INDEX_REQUEST.decode(frames)
        self.received.append(message)
        if isinstance(message, Register) and self.answer:
            if self.refuse:
                self.say(IndexFailed(message.call_id, "invalid_request", "no"))
            else:
                self.say(Registered(message.call_id, self._incarnation))

    def say(self, reply: IndexReply) -> None:
        self._socket.send(self._peer, INDEX_REPLY.encode(reply))

    def say_junk(self) -> None:
        self._socket.send(self._peer, [b"junk"])

    def count(self, kind: type[IndexRequest]) -> int:
        return sum(isinstance(message, kind) for message in self.received)

    def close(self) -> None:
        self._socket.close()


class Member:
    """An engine's client, running."""

    def __init__(self, world: World, address: str, *, liveness: int = 5) -> None:
        self.load = EngineLoad(free_blocks=3)
        self.refusals: list[str] = []
        self.client = IndexClient(
            world.bus,
            address,
            info=INFO,
            load=lambda: self.load,
            heartbeat_interval_s=0.02,
            liveness=liveness,
            on_refused=self.refusals.append,
        )
        self.task = asyncio.ensure_future(self.client.run())
        world.at_end(self.client.close)
        world.at_end(self.task.cancel)


def test_registers_and_beats_with_its_load() -> None:
    async def test(world: World) -> None:
        index = Index(world, 1)
        member = Member(world, index.address)
        await world.until(lambda: member.client.registered)
        assert index.received[:2] == [Register(1, INFO), Beat("e1", 11, EngineLoad(free_blocks=3))]

        member.load = EngineLoad(free_blocks=2)

        await world.until(lambda: Beat("e1", 11, EngineLoad(free_blocks=2)) in index.received)

    in_world(test)


def test_unknown_is_answered_by_registering_at_once() -> None:
    async def test(world: World) -> None:
        index = Index(world, 1)
        member = Member(world, index.address)
        await world.until(lambda: member.client.registered)
        index.received.clear()
        index.answer = False
        index.say(Unknown("another"))
        index.say(Unknown("e1"))
        await world.until(lambda: not member.client.registered)
        index.answer = True

        await world.until(lambda: member.client.registered)

    in_world(test)


def test_index_that_is_absent_is_logged_once_and_found_when_it_comes() -> None:
    async def test(world: World) -> None:
        address = world.place()
        with structlog.testing.capture_logs() as events:
            member = Member(world, address)
            await world.until(lambda: bool(events))
            opened = member.client._opened_at
            await world.until(lambda: member.client._opened_at > opened)  # a fresh socket, at least once

            index = Index(world, 2, address)
            await world.until(lambda: member.client.registered)

        assert [e["event"] for e in events] == [log.INDEX_LOST, log.INDEX_JOINED]
        assert index.count(Register) <= 2 * 6, "what was queued while it was absent is thrown away"

    in_world(test)


def test_restarted_index_is_registered_with_again() -> None:
    async def test(world: World) -> None:
        first = Index(world, 1, world.place())
        with structlog.testing.capture_logs() as events:
            member = Member(world, first.address)
            await world.until(lambda: member.client.registered)
            first.close()
            await world.until(lambda: not member.client.registered)
            second = Index(world, 2, first.address)
            await world.until(lambda: member.client.registered)

        assert second.count(Register) >= 1
        assert [e["event"] for e in events] == [log.INDEX_JOINED, log.INDEX_LOST, log.INDEX_JOINED]

    in_world(test)


def test_index_that_restarts_unnoticed_is_seen_by_its_incarnation() -> None:
    async def test(world: World) -> None:
        index = Index(world, 1)
        with structlog.testing.capture_logs() as events:
            member = Member(world, index.address)
            await world.until(lambda: member.client.registered)
            index._incarnation = 2
            await world.until(lambda: len(events) == 2)

        assert [(e["event"], e["incarnation"]) for e in events] == [
            (log.INDEX_JOINED, 1),
            (log.INDEX_JOINED, 2),
        ]
        assert member.client.registered

    in_world(test)


def test_refused_engine_keeps_beating_and_asks_again_later() -> None:
    async def test(world: World) -> None:
        index = Index(world, 1)
        index.refuse = True
        with structlog.testing.capture_logs() as events:
            member = Member(world, index.address)
            # It asks again after as long as silence would last, however late beats come on a busy machine.
            await world.until(lambda: index.count(Beat) >= 4 and index.count(Register) < index.count(Beat))
            assert not member.client.registered
            index.refuse = False
            await world.until(lambda: member.client.registered)

        assert [e["event"] for e in events][:1] == [log.ENGINE_REFUSED]

    in_world(test)


def test_junk_from_the_index_is_dropped() -> None:
    async def test(world: World) -> None:
        index = Index(world, 1)
        member = Member(world, index.address)
        await world.until(lambda: member.client.registered)
        index.say_junk()
        beats = index.count(Beat)
        await world.until(lambda: index.count(Beat) > beats + 2)
        assert not member.task.done()

    in_world(test)


def test_close_deregisters_once_and_ends_the_run() -> None:
    async def test(world: World) -> None:
        index = Index(world, 1)
        member = Member(world, index.address)
        await world.until(lambda: member.client.registered)

        member.client.close()
        member.client.close()

        await member.task
        await world.until(lambda: index.received[-1] == Deregister("e1", 11))
        assert index.count(Deregister) == 1

    in_world(test)


def test_a_refusal_is_said_once_and_asked_about_for_ever() -> None:
    """Whom we differ from may leave: then we are in, without anybody's doing."""

    async def test(world: World) -> None:
        index = Index(world, 1)
        index.refuse = True
        with structlog.testing.capture_logs() as events:
            member = Member(world, index.address)
            await world.until(lambda: index.count(Register) >= 3)
            assert [e["error"] for e in events if e["event"] == log.ENGINE_REFUSED] == ["no"]
            assert member.refusals == ["no"]
            index.refuse = False
            await world.until(lambda: member.client.registered)
            assert member.refusals == ["no", ""]

    in_world(test)
