"""A feed keeps one engine's entries true over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from microserve.kvcache.prefix.index import PrefixIndex
from microserve.protocol.errors import EngineLost
from microserve.protocol.messages.engine import SnapshotReply
from microserve.protocol.messages.kv.kv_events import BlockRemoved, KVEventBatch, encode_batch, publish_frames
from microserve.protocol.settings.settings import BusSettings
from microserve.services.links.engine import RouterIdentity
from microserve.services.links.feed import KvFeed
from microserve.services.links.snapshot import read_snapshot
from tests.support.index.index_world import BLOCK_SIZE, Engine, World, in_world

PROMPT = list(range(100, 100 + 4 * BLOCK_SIZE))
WHO = RouterIdentity("index-1", 5)
OTHER = list(range(500, 500 + 2 * BLOCK_SIZE))


class Reader:
    """An index with a feed from one engine."""

    def __init__(self, world: World, engine: Engine) -> None:
        self.index = PrefixIndex(BLOCK_SIZE, engine.info.model, 1 << 20)
        self.feed = KvFeed(
            world.bus,
            engine.info,
            self.index,
            lambda: read_snapshot(world.bus, engine.info, WHO, BusSettings()),
        )
        world.at_end(self.feed.close)
        self.feed.start()

    def holds(self, tokens: list[int]) -> int:
        return self.index.lookup(tokens).get("e1", 0)


def test_what_was_held_before_the_feed_started_comes_as_a_snapshot() -> None:
    async def test(world: World) -> None:
        engine = world.engine()
        engine.compute(PROMPT)
        reader = Reader(world, engine)

        await world.until(lambda: reader.holds(PROMPT) == len(PROMPT))

        assert reader.feed.lag.live
        assert reader.feed.counters.snapshots == 1

    in_world(test)


def test_what_is_computed_later_comes_as_events() -> None:
    async def test(world: World) -> None:
        engine = world.engine()
        reader = Reader(world, engine)
        await world.until(lambda: reader.feed.lag.live)

        def arrived() -> bool:
            engine.publisher.beat()  # a subscription that took effect late shows as a gap
            return reader.holds(PROMPT) == len(PROMPT)

        engine.compute(PROMPT)
        await world.until(arrived)
        engine.clear()
        await world.until(lambda: reader.holds(PROMPT) == 0)

    in_world(test)


async def live_reader(world: World, engine: Engine) -> Reader:
    """A reader that receives every batch from now on."""
    reader = Reader(world, engine)

    def joined() -> bool:
        engine.publisher.publish([BlockRemoved([])])
        return reader.feed.lag.live and reader.feed.counters.applied > 2

    await world.until(joined)
    applied = engine.publisher.next_seq
    await world.until(lambda: reader.feed._state.next_seq == applied)
    return reader


def test_lost_batch_is_found_by_the_next_and_repaired() -> None:
    async def test(world: World) -> None:
        engine = world.engine()
        reader = await live_reader(world, engine)
        snapshots = engine.num_snapshots

        world.bus.lose = lambda frames: True
        engine.compute(PROMPT)
        await world.until(lambda: world.bus.num_lost > 0)
        world.bus.lose = lambda frames: False
        engine.compute(OTHER)

        await world.until(lambda: reader.holds(OTHER) == len(OTHER))
        assert reader.holds(PROMPT) == len(PROMPT)
        assert reader.feed.counters.gaps == 1
        assert engine.num_snapshots == snapshots + 1

    in_world(test)


def test_lost_batch_of_an_engine_that_then_idles_is_found_by_its_heartbeat() -> None:
    async def test(world: World) -> None:
        engine = world.engine()
        reader = await live_reader(world, engine)

        world.bus.lose = lambda frames: True
        engine.compute(PROMPT)
        await world.until(lambda: world.bus.num_lost > 0)
        world.bus.lose = lambda frames: False
        assert reader.holds(PROMPT) == 0
        engine.publisher.beat()
        engine.publisher.beat()

        await world.until(lambda: reader.holds(PROMPT) == len(PROMPT))

    in_world(test)


def test_junk_is_counted_and_costs_no_more_than_a_snapshot() -> None:
    async def test(world: World) -> None:
        publisher = world.bus.publisher("tcp://127.0.0.1:0")
        engine = world.engine()
        index = PrefixIndex(BLOCK_SIZE, "m", 1 << 20)
        seq = 0

        async def snapshot() -> tuple[SnapshotReply, bytes]:
            return SnapshotReply(1, info.incarnation, seq), batch()

        def batch() -> bytes:
            return encode_batch(KVEventBatch(0.0, [BlockRemoved([])], None, info.incarnation))

        info = msgspec.structs.replace(engine.info, events_address=publisher.address)
        feed = KvFeed(world.bus, info, index, snapshot)
        world.at_end(feed.close)
        feed.start()

        def send(frames: list[bytes]) -> None:
            publisher.send(frames)

        def rejected() -> bool:
            for junk in (
                [b""],
                [b"t", b"x", b"y"],
                publish_frames("t", 0, b"\xc1"),
                [b"a", b"b", b"c", b"d"],
            ):
                send(junk)
            return feed.num_rejected >= 8

        await world.until(rejected)
        seq = 5
        send(publish_frames("t", 5, batch()))
        send(publish_frames("t", 7, batch()))
        await world.until(lambda: feed.counters.gaps >= 1)
        seq = 8
        await world.until(lambda: feed.lag.live and feed._state.next_seq == 8)

    in_world(test)


def test_snapshot_that_fails_is_asked_for_again() -> None:
    async def test(world: World) -> None:
        engine = world.engine()
        engine.refuse_snapshots = True
        engine.compute(PROMPT)
        reader = Reader(world, engine)
        await world.until(lambda: reader.feed.counters.snapshot_failures >= 2)
        assert not reader.feed.lag.live

        engine.refuse_snapshots = False

        await world.until(lambda: reader.holds(PROMPT) == len(PROMPT))

    in_world(test)


def test_engine_that_is_restarted_in_place_is_read_afresh() -> None:
    """A new life at the same addresses, before the membership knows: the old life's blocks go."""

    async def test(world: World) -> None:
        address = world.place()
        engine = world.engine(incarnation=11, events_address=address)
        engine.compute(PROMPT)
        lives = [engine]

        async def snapshot() -> tuple[SnapshotReply, bytes]:
            life = lives[-1]
            blocks = life.snapshot_events()
            return SnapshotReply(1, life.info.incarnation, life.publisher.next_seq), blocks

        index = PrefixIndex(BLOCK_SIZE, "m", 1 << 20)
        feed = KvFeed(world.bus, engine.info, index, snapshot)
        world.at_end(feed.close)
        feed.start()
        await world.until(lambda: index.lookup(PROMPT) == {"e1": len(PROMPT)})

        engine.close()
        reborn = world.engine(incarnation=3, events_address=address)
        lives.append(reborn)
        reborn.compute(OTHER)

        def read() -> bool:
            reborn.publisher.beat()
            return index.lookup(OTHER) == {"e1": len(OTHER)}

        await world.until(read)
        assert index.lookup(PROMPT) == {}
        assert feed.counters.epochs == 1

    in_world(test)


def test_engine_in_vllms_keys_alone_is_followed_and_its_next_life_is_known_by_its_numbers() -> None:
    async def test(world: World) -> None:
        address = world.place()
        engine = world.engine(incarnation=11, events_address=address, strict=True)
        lives = [engine]

        async def snapshot() -> tuple[SnapshotReply, bytes]:
            life = lives[-1]
            blocks = life.snapshot_events()
            return SnapshotReply(1, life.info.incarnation, life.publisher.next_seq), blocks

        index = PrefixIndex(BLOCK_SIZE, "m", 1 << 20)
        feed = KvFeed(world.bus, engine.info, index, snapshot)
        world.at_end(feed.close)
        feed.start()

        def heard(tokens: list[int]) -> Callable[[], bool]:
            def is_heard() -> bool:
                lives[-1].publisher.publish([BlockRemoved([])])
                return index.lookup(tokens) == {"e1": len(tokens)}

            return is_heard

        engine.compute(PROMPT)
        await world.until(heard(PROMPT))
        for _ in range(2000):
            engine.publisher.publish([BlockRemoved([])])

        def is_far() -> bool:
            engine.publisher.publish([BlockRemoved([])])
            return feed._last_seq > 2000

        await world.until(is_far)
        engine.close()
        lives.append(world.engine(incarnation=3, events_address=address, strict=True))
        lives[-1].compute(OTHER)
        await world.until(heard(OTHER))
        assert index.lookup(PROMPT) == {}
        lives[-1].clear()

        def is_cleared() -> bool:
            lives[-1].publisher.beat()
            return index.lookup(OTHER) == {}

        await world.until(is_cleared)

    in_world(test)


def test_attempt_that_raises_anything_does_not_end_the_feed() -> None:
    async def test(world: World) -> None:
        engine = world.engine()
        engine.compute(PROMPT)
        failures = [RuntimeError("a bug"), EngineLost("gone"), TimeoutError()]

        async def snapshot() -> tuple[SnapshotReply, bytes]:
            if failures:
                raise failures.pop()
            return await read_snapshot(world.bus, engine.info, WHO, BusSettings())

        index = PrefixIndex(BLOCK_SIZE, "m", 1 << 20)
        feed = KvFeed(world.bus, engine.info, index, snapshot)
        world.at_end(feed.close)
        feed.start()

        await world.until(lambda: bool(index.lookup(PROMPT)))
        assert feed.counters.snapshot_failures == 3

    in_world(test)


def test_snapshot_bytes_that_cannot_be_read_are_a_failure() -> None:
    async def test(world: World) -> None:
        engine = world.engine()
        answers = [b"junk", b""]

        async def snapshot() -> tuple[SnapshotReply, bytes]:
            good = encode_batch(KVEventBatch(0.0, [], None, 11))
            return SnapshotReply(1, 11, 0), answers.pop() if answers else good

        feed = KvFeed(world.bus, engine.info, PrefixIndex(BLOCK_SIZE, "m", 1 << 20), snapshot)
        world.at_end(feed.close)
        feed.start()

        await world.until(lambda: feed.lag.live)
        assert feed.counters.snapshot_failures == 2

    in_world(test)


def test_closed_feed_leaves_no_task() -> None:
    async def test(world: World) -> None:
        engine = world.engine()
        engine.refuse_snapshots = True
        reader = Reader(world, engine)
        await world.until(lambda: reader.feed.counters.snapshot_failures >= 1)

        reader.feed.close()
        reader.feed.close()

        await world.until(lambda: asyncio.all_tasks() == {asyncio.current_task()})

    in_world(test)
