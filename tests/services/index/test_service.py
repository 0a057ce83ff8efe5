"""The index over real sockets: members, watchers, lookups, and what it does with junk."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
import structlog

from microserve.protocol import log
from microserve.protocol.bus.codec import INDEX_REQUEST, encode_tokens
from microserve.protocol.messages.engine import EngineInfo, EngineLoad
from microserve.protocol.messages.index import (
    Beat,
    Deregister,
    IndexFailed,
    IndexReport,
    IndexStats,
    Lookup,
    Matches,
    Member,
    Members,
    Register,
    Registered,
    Unknown,
    Watch,
)
from microserve.services.index import service as module
from tests.support.index.index_service import Index, Peer, with_index
from tests.support.index.index_world import BLOCK_SIZE, Engine, World, in_world, make_info

PROMPT = list(range(100, 100 + 4 * BLOCK_SIZE))


async def reported(peer: Peer, condition: Callable[[IndexReport], bool]) -> None:
    """Wait until the index reports what is expected."""
    async with asyncio.timeout(30):
        while True:
            if condition(await peer.ask(IndexReport, IndexStats(1))):
                return
            await asyncio.sleep(0.005)


async def register(peer: Peer, info: EngineInfo) -> Registered:
    return await peer.ask(Registered, Register(1, info))


async def indexed(world: World, peer: Peer, tokens: list[int], expected: dict[str, int]) -> None:
    """Wait until a lookup of ``tokens`` says what is expected."""
    async with asyncio.timeout(30):
        while True:
            matches = await peer.ask(Matches, Lookup(9), encode_tokens(tokens))
            if matches.matched == expected:
                return
            await asyncio.sleep(0.005)


def test_register_is_answered_and_idempotent() -> None:
    async def test(world: World, index: Index) -> None:
        engine, peer = world.engine(), index.peer()

        first = await peer.ask(Registered, Register(41, engine.info))
        again = await peer.ask(Registered, Register(42, engine.info))

        assert (first.call_id, again.call_id) == (41, 42)
        assert first.index_incarnation == again.index_incarnation > 0
        members = await peer.ask(Members, Watch("w"))
        assert members.members == [Member(engine.info, EngineLoad())]
        assert (members.index_incarnation, members.version) == (first.index_incarnation, 1)

    with_index(test)


def test_watcher_hears_at_each_change_and_whenever_it_says_that_it_watches() -> None:
    async def test(world: World, index: Index) -> None:
        watcher, peer = index.peer(), index.peer()
        assert (await watcher.ask(Members, Watch("w"))).members == []

        e1, e2 = world.engine("e1"), world.engine("e2", 12)
        await register(peer, e1.info)
        await register(peer, e2.info)
        await world.until(lambda: watcher.sees("e1", "e2"))
        peer.send(Beat("e1", 11, EngineLoad(free_blocks=7)))
        async with asyncio.timeout(30):  # loads are no change
            while (await watcher.ask(Members, Watch("w"))).members[0].load.free_blocks != 7:
                await asyncio.sleep(0.005)
        peer.send(Deregister("e2", 12))
        await world.until(lambda: watcher.sees("e1"))

        versions = [reply.version for reply in watcher.replies if isinstance(reply, Members)]
        assert versions == sorted(versions)
        assert versions[-1] == 3

    with_index(test)


def test_silent_watcher_is_forgotten() -> None:
    async def test(world: World, index: Index) -> None:
        watcher, peer = index.peer(), index.peer()
        await watcher.ask(Members, Watch("w"))

        await reported(peer, lambda report: report.counters["watchers"] == 1)
        await reported(peer, lambda report: report.counters["watchers"] == 0)

    with_index(test, interval_s=0.02, liveness=3)


@pytest.mark.slow
def test_watcher_that_is_gone_is_forgotten() -> None:
    async def test(world: World, index: Index) -> None:
        watcher, peer = index.peer(), index.peer()
        await watcher.ask(Members, Watch("w"))
        watcher.socket.close()
        await reported(peer, lambda report: report.counters["watchers"] == 0)

    with_index(test)


def test_number_of_watchers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WATCHERS", 1)

    async def test(world: World, index: Index) -> None:
        first, second = index.peer(), index.peer()
        await first.ask(Members, Watch("w1"))
        assert (await second.ask(IndexFailed, Watch("w2"))).code == "queue_full"

    with_index(test)


def test_beat_of_a_stranger_is_unknown() -> None:
    async def test(world: World, index: Index) -> None:
        assert await index.peer().ask(Unknown, Beat("e1", 11, EngineLoad())) == Unknown("e1")

    with_index(test)


def test_engine_that_does_not_fit_is_refused_naming_both_values() -> None:
    async def test(world: World, index: Index) -> None:
        peer = index.peer()
        await register(peer, world.engine("e1").info)

        with structlog.testing.capture_logs() as events:
            failed = await peer.ask(IndexFailed, Register(7, make_info("e2", block_size=BLOCK_SIZE * 2)))

        assert (failed.call_id, failed.code) == (7, "invalid_request")
        assert failed.detail == "e2 has block_size 8, e1 has 4; they must agree"
        [refused] = [e for e in events if e["event"] == log.ENGINE_REFUSED]
        assert (refused["engine_id"], refused["code"]) == ("e2", "invalid_request")
        assert (await peer.ask(Members, Watch("w"))).version == 1

    with_index(test)


def test_silent_engine_is_lost_with_what_it_held() -> None:
    async def test(world: World, index: Index) -> None:
        engine, peer, watcher = world.engine(), index.peer(), index.peer()
        engine.compute(PROMPT)
        await watcher.ask(Members, Watch("w"))
        with structlog.testing.capture_logs() as events:
            await register(peer, engine.info)
            await world.until(lambda: watcher.sees("e1"))
            async with asyncio.timeout(30):
                while not watcher.sees():
                    watcher.send(Watch("w"))
                    await asyncio.sleep(0.02)

        lost = [e for e in events if e["event"] == log.ENGINE_LOST]
        assert [(e["engine_id"], e["reason"]) for e in lost] == [("e1", "silent")]
        assert (await peer.ask(Matches, Lookup(1), encode_tokens(PROMPT))).matched == {}
        report = await peer.ask(IndexReport, IndexStats(1))
        assert (report.num_engines, report.num_blocks) == (0, 0)

    with_index(test, interval_s=0.05, liveness=6)


def test_lookup_tells_who_holds_how_much() -> None:
    async def test(world: World, index: Index) -> None:
        e1, e2, peer = world.engine("e1"), world.engine("e2", 12), index.peer()
        e1.compute(PROMPT)
        await register(peer, e1.info)
        await register(peer, e2.info)
        await indexed(world, peer, PROMPT, {"e1": len(PROMPT)})

        e2.compute(PROMPT[: 2 * BLOCK_SIZE])
        e2.publisher.beat()
        e2.publisher.beat()
        await indexed(world, peer, PROMPT, {"e1": len(PROMPT), "e2": 2 * BLOCK_SIZE})

        salted = await peer.ask(Matches, Lookup(1, salt="tenant"), encode_tokens(PROMPT))
        assert salted.matched == {}
        report = await peer.ask(IndexReport, IndexStats(5))
        assert (report.call_id, report.num_engines, report.num_blocks) == (5, 2, 4)
        assert 0 < report.nbytes <= 2 << 20
        assert report.counters["lookups"] >= 2

    with_index(test)


def test_models_live_side_by_side() -> None:
    async def test(world: World, index: Index) -> None:
        e1, e2, peer = world.engine("e1"), world.engine("e2", 12, model="other"), index.peer()
        e1.compute(PROMPT)
        e2.compute(PROMPT[:BLOCK_SIZE])
        await register(peer, e1.info)
        await register(peer, e2.info)
        await indexed(world, peer, PROMPT, {"e1": len(PROMPT), "e2": BLOCK_SIZE})

        failed = await peer.ask(IndexFailed, Register(3, make_info("e3", 13, model="third")))
        assert failed.code == "queue_full"
        assert "index.max_mb has room for 2 models" in failed.detail

        peer.send(Deregister("e2", 12))
        await indexed(world, peer, PROMPT, {"e1": len(PROMPT)})
        await register(peer, world.engine("e3", 13, model="third").info)

    with_index(test)


def test_new_life_of_an_engine_replaces_what_the_old_one_held() -> None:
    async def test(world: World, index: Index) -> None:
        old, peer = world.engine("e1", 11), index.peer()
        old.compute(PROMPT)
        await register(peer, old.info)
        await indexed(world, peer, PROMPT, {"e1": len(PROMPT)})

        new = world.engine("e1", 12)
        new.compute(PROMPT[:BLOCK_SIZE])
        await register(peer, new.info)

        await indexed(world, peer, PROMPT, {"e1": BLOCK_SIZE})
        assert await peer.ask(Unknown, Beat("e1", 11, EngineLoad())) == Unknown("e1")
        failed = await peer.ask(IndexFailed, Register(3, old.info))
        assert failed.code == "engine_lost"

    with_index(test)


def test_lookup_without_tokens_is_refused() -> None:
    async def test(world: World, index: Index) -> None:
        peer = index.peer()
        for bulk in ((), (b"12345",), (b"1234", b"1234")):
            failed = await peer.ask(IndexFailed, Lookup(8), *bulk)
            assert (failed.call_id, failed.code) == (8, "protocol_violation")

    with_index(test)


def test_junk_is_answered_or_dropped_and_the_service_goes_on() -> None:
    async def test(world: World, index: Index) -> None:
        peer = index.peer()
        rng = random.Random(1)
        good = INDEX_REQUEST.encode(Register(1, make_info()))
        peer.socket.send([b"nothing"])
        await world.until(lambda: bool(peer.replies))
        assert isinstance(peer.replies[0], IndexFailed)
        assert (peer.replies[0].call_id, peer.replies[0].code) == (0, "protocol_violation")

        for _ in range(500):
            frames = [bytes(frame) for frame in good]
            which = rng.randrange(2)
            cut = bytearray(frames[which])
            for _ in range(rng.randrange(1, 4)):
                cut[rng.randrange(len(cut))] = rng.randrange(256)
            frames[which] = bytes(cut[: rng.randrange(len(cut) + 1)])
            peer.socket.send(frames * rng.randrange(1, 4))

        report = await peer.ask(IndexReport, IndexStats(3))
        assert report.counters["frames_rejected"] > 300
        assert not index.task.done()

    with_index(test)


def test_address_that_cannot_be_reached_is_refused() -> None:
    async def test(world: World, index: Index) -> None:
        peer = index.peer()
        wrong = [{"address": "nonsense"}, {"events_address": "tcp://"}, {"address": "tcp://host:x"}]
        for life, changes in enumerate(wrong, start=1):
            info = make_info("e1", life, **changes)
            failed = await peer.ask(IndexFailed, Register(4, info))
            assert (failed.call_id, failed.code) == (4, "invalid_request")
            assert next(iter(changes.values())) in failed.detail
        report = await peer.ask(IndexReport, IndexStats(3))
        assert (report.num_engines, report.num_blocks, report.nbytes) == (0, 0, 0)

    with_index(test)


def test_stall_of_the_index_itself_costs_no_member() -> None:
    async def test(world: World, index: Index) -> None:
        engine, peer = world.engine(), index.peer()
        await register(peer, engine.info)
        peer.send(Beat("e1", 11, EngineLoad()))
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + 0.4
        while loop.time() < ends_at:  # the loop is blocked for more than the silence that is allowed
            pass
        peer.send(Beat("e1", 11, EngineLoad()))

        assert (await peer.ask(IndexReport, IndexStats(1))).num_engines == 1

    with_index(test, interval_s=0.05, liveness=6)


def test_the_index_keeps_no_connection_to_an_engine_whose_snapshot_it_has() -> None:
    async def test(world: World, index: Index) -> None:
        engine, peer = world.engine(), index.peer()
        num_sockets = len(world.bus.sockets)
        await register(peer, engine.info)
        await world.until(lambda: engine.num_snapshots == 1)
        await world.until(lambda: len(world.bus.sockets) == num_sockets + 1)  # the feed's subscriber

        assert engine.pings == []

    with_index(test)


def test_an_action_address_that_cannot_be_one_is_refused_at_the_door() -> None:
    async def test(world: World, index: Index) -> None:
        peer = index.peer()
        failed = await peer.ask(IndexFailed, Register(1, make_info(address="nowhere")))

        assert (failed.code, failed.field) == ("invalid_request", "address")
        assert (await peer.ask(IndexReport, IndexStats(2))).num_engines == 0

    with_index(test)


def test_end_closes_every_socket_and_task() -> None:
    async def test(world: World) -> None:
        index = await Index(world).ready()
        engines: list[Engine] = [world.engine(f"e{i}", i + 1) for i in range(3)]
        peer = index.peer()
        for engine in engines:
            await register(peer, engine.info)
        peer.socket.close()
        await index.stop()
        for engine in engines:
            engine.close()

        await world.until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
        assert world.bus.sockets == []

    in_world(test)
