"""A stock engine's events are followed over real sockets, by their replay."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from microserve.kvcache.prefix.index import PrefixIndex
from microserve.protocol.messages.engine import SnapshotReply
from microserve.protocol.messages.engine_info import ABILITIES, SNAPSHOT
from microserve.protocol.messages.kv.kv_events import AllBlocksCleared, BlockStored, KVEvent, WireBatch
from microserve.services.index.foreign import foreign_engines
from microserve.services.links import follow as module
from microserve.services.links.feed import Feed, KvFeed
from microserve.services.links.follow import KvFollower, feed_of
from tests.support.index.foreign_engine import ForeignEngine
from tests.support.index.index_world import BLOCK_SIZE, World, in_world, make_info

pytestmark = pytest.mark.slow  # sockets, each time, and peers that do not answer

A, B, C = ([number] * BLOCK_SIZE for number in (1, 2, 3))


def stored(name: int, tokens: list[int], parent: int | None = None) -> bytes:
    return batch(BlockStored([name], parent, tokens, BLOCK_SIZE, medium="GPU"))


def batch(*events: KVEvent) -> bytes:
    batch.count += 1  # type: ignore[attr-defined]
    return msgspec.msgpack.encode(WireBatch(batch.count, list(events), 0))  # type: ignore[attr-defined]


batch.count = 0.0  # type: ignore[attr-defined]


class Reader:
    def __init__(self, world: World, line: str) -> None:
        [info] = foreign_engines([line], 1)
        self.index = PrefixIndex(BLOCK_SIZE, "m", 1 << 20)
        self.feed = feed_of(world.bus, info, self.index, _never)
        assert isinstance(self.feed, KvFollower)
        world.at_end(self.feed.close)
        self.feed.start()

    def holds(self, *blocks: list[int]) -> bool:
        tokens = [token for block in blocks for token in block]
        return self.index.lookup(tokens) == {"v0": len(tokens)}


async def _never() -> tuple[SnapshotReply, bytes]:
    raise AssertionError("it has no snapshot")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.05)
    monkeypatch.setattr(module, "REPLAY_TIMEOUT_S", 1.0)


def test_what_was_stored_before_comes_by_replay_and_later_as_events() -> None:
    async def test(world: World) -> None:
        engine = ForeignEngine(world.bus)
        world.at_end(engine.close)
        engine.publish(stored(1, A))
        reader = Reader(world, engine.line("v0", "m", BLOCK_SIZE))
        await world.until(lambda: reader.holds(A) and reader.feed.lag.live)
        engine.publish(stored(2, B, 1))
        await world.until(lambda: reader.holds(A, B))

    in_world(test)


def test_the_last_batch_is_lost_and_found_though_the_engine_idles() -> None:
    async def test(world: World) -> None:
        engine = ForeignEngine(world.bus)
        world.at_end(engine.close)
        reader = Reader(world, engine.line("v0", "m", BLOCK_SIZE))
        await world.until(lambda: reader.feed.lag.live)
        engine.publish(stored(1, A), is_lost=True)
        await world.until(lambda: reader.holds(A))
        engine.publish(stored(2, B, 1), is_lost=True)
        engine.publish(stored(3, C, 2))
        await world.until(lambda: reader.holds(A, B, C))

    in_world(test)


def test_another_life_at_the_same_place_is_known_for_one() -> None:
    async def test(world: World) -> None:
        events, replay = world.place(), f"{world.place()}-replay"
        engine = ForeignEngine(world.bus, events=events, replay=replay)
        engine.publish(stored(1, A))
        engine.publish(stored(2, B, 1))
        reader = Reader(world, engine.line("v0", "m", BLOCK_SIZE))
        await world.until(lambda: reader.holds(A, B))
        engine.close()

        reborn = ForeignEngine(world.bus, events=events, replay=replay)
        world.at_end(reborn.close)
        reborn.publish(stored(1, C))
        await world.until(lambda: reader.holds(C))
        assert reader.index.lookup(A) == {}

    in_world(test)


def test_an_engine_that_is_gone_or_hangs_holds_nothing_that_is_known() -> None:
    async def test(world: World) -> None:
        events, replay = world.place(), f"{world.place()}-replay"
        engine = ForeignEngine(world.bus, events=events, replay=replay)
        engine.publish(stored(1, A))
        reader = Reader(world, engine.line("v0", "m", BLOCK_SIZE))
        await world.until(lambda: reader.holds(A))
        engine.answers = False
        await world.until(lambda: reader.index.num_blocks == 0)
        assert not reader.feed.lag.live
        engine.answers = True
        await world.until(lambda: reader.holds(A))
        engine.close()
        await world.until(lambda: reader.index.num_blocks == 0)

    in_world(test)


def test_what_cannot_be_read_costs_what_was_known_and_no_more() -> None:
    async def test(world: World) -> None:
        engine = ForeignEngine(world.bus)
        world.at_end(engine.close)
        engine.publish(stored(1, A))
        engine.publish(b"\xc1")
        engine.publish(stored(2, B))
        reader = Reader(world, engine.line("v0", "m", BLOCK_SIZE))
        await world.until(lambda: reader.holds(B))
        assert reader.index.lookup(A) == {}
        engine.publish(b"\xc1")
        engine.publish(stored(3, C))
        await world.until(lambda: reader.holds(C))
        assert reader.index.lookup(B) == {}
        assert reader.feed.num_rejected >= 2

    in_world(test)


def test_a_replay_of_countless_small_batches_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REPLAYED_NBYTES", 64 << 10)

    async def test(world: World) -> None:
        engine = ForeignEngine(world.bus)
        world.at_end(engine.close)
        for _ in range(200):
            engine.publish(batch(AllBlocksCleared()))
        reader = Reader(world, engine.line("v0", "m", BLOCK_SIZE))
        await world.until(lambda: reader.feed.counters.snapshot_failures > 0)
        assert reader.feed.counters.snapshots == 0

    in_world(test)


def test_without_a_replay_only_what_is_heard_is_known() -> None:
    async def test(world: World) -> None:
        engine = ForeignEngine(world.bus)
        world.at_end(engine.close)
        reader = Reader(world, f"v0 model=m events={engine.events} block_size={BLOCK_SIZE}")

        def heard() -> bool:
            engine.publish(batch(AllBlocksCleared(), BlockStored([1], None, A, BLOCK_SIZE, medium="GPU")))
            return reader.holds(A)

        await world.until(heard)
        assert engine.num_replays == 0

    in_world(test)


def test_who_has_snapshots_is_asked_for_them() -> None:
    async def test(world: World) -> None:
        def kind(**changes: Any) -> type[Feed]:
            info = make_info(**changes)
            return type(feed_of(world.bus, info, PrefixIndex(BLOCK_SIZE, "m", 1 << 20), _never))

        assert kind() is kind(can=[*ABILITIES]) is KvFeed
        assert kind(can=[each for each in ABILITIES if each != SNAPSHOT]) is KvFollower
        assert kind(address="", can=[]) is KvFollower

    in_world(test)
