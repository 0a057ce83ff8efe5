from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.grant.table import GrantTable
from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.heap.heap import Heap, PeerHeap
from microserve.kvcache.heap.local import MemoryHeap, MemoryRegistry
from microserve.kvcache.words import CHECKSUMMED, CLAIMED, pack_count, pack_state
from microserve.protocol.errors import (
    InternalError,
    InvalidRequest,
    MeshError,
    TransferFailed,
)
from microserve.protocol.messages.kv.grant import MAX_LANES, Grant, HeapAddress
from tests.support.kvcache.kv_samples import POISON_BYTE, data_of, fill, make_layout, mismatches

SENDER, RECEIVER = 1, 2


@dataclass
class Pair:
    """A sender with 12 filled blocks and a receiver with 8, and what the sender may write to."""

    sender: Heap
    receiver: Heap
    peer: PeerHeap
    pool: BlockPool
    table: GrantTable
    source_blocks: list[int]

    def open(self, *, matched: int = 0, end: int) -> Grant:
        size = self.receiver.layout.block_size
        matched_blocks = self.pool.allocate(matched // size)
        blocks = self.pool.allocate(self.receiver.layout.num_blocks_for(end - matched))
        return self.table.open("request", "router", matched_blocks, matched, blocks, end, now=0.0)

    def writer(self, grant: Grant, lane: int, begin: int, end: int, *, checksums: bool = True) -> LaneWriter:
        return LaneWriter(self.sender, self.peer, grant, lane, begin, end, checksums=checksums)


@pytest.fixture
def pair() -> Iterator[Pair]:
    registry = MemoryRegistry()
    sender = MemoryHeap(make_layout(num_blocks=12), incarnation=SENDER, registry=registry)
    receiver = MemoryHeap(make_layout(num_blocks=8), incarnation=RECEIVER, registry=registry)
    receiver.data[:] = POISON_BYTE
    pool = BlockPool(8)
    table = GrantTable(
        *(receiver, pool), engine_id="e", incarnation=RECEIVER, lease_s=1.0, verify_checksums=True
    )
    blocks = random.Random(3).sample(range(12), 8)
    fill(sender, blocks, 32, seed=5)
    yield Pair(sender, receiver, sender.attach(receiver.address), pool, table, blocks)
    receiver.close()
    sender.close()


def test_a_whole_transfer(pair: Pair) -> None:
    grant = pair.open(matched=8, end=22)
    writer = pair.writer(grant, 0, 0, 22)
    writer.claim()
    for layer in range(2):
        writer.put_layer(layer, pair.source_blocks, 0, 22)
    writer.set_first_token(0)
    writer.finish()

    assert pair.table.is_complete(grant.grant_id)
    assert pair.table.first_token(grant.grant_id) == 0
    for layer in range(2):
        pair.table.verify(grant.grant_id, layer)
    assert not mismatches(pair.receiver, grant.blocks, 8, 8, 22, seed=5)


def test_a_claim_says_who_writes_what(pair: Pair) -> None:
    grant = pair.open(end=16)

    pair.writer(grant, 2, 3, 9).claim()

    load, words = pair.receiver.load, pair.receiver.words
    assert load(words.claim(0, 2)) == pack_state(grant.generation, CLAIMED | CHECKSUMMED)
    assert load(words.writer(0, 2)) == SENDER
    assert load(words.begin(0, 2)) == pack_count(grant.generation, 3)
    assert load(words.end(0, 2)) == pack_count(grant.generation, 9)
    assert pair.receiver.is_held(0, 2)
    assert not pair.receiver.is_held(0, 1)


def test_a_closed_grant_cannot_be_claimed(pair: Pair) -> None:
    grant = pair.open(end=16)
    pair.table.close(grant.grant_id, now=0.0)
    before = pair.receiver.load_each(np.arange(pair.receiver.words.num_words))
    writer = pair.writer(grant, 0, 0, 16)

    with pytest.raises(TransferFailed, match="closed"):
        writer.claim()

    assert not pair.receiver.is_held(0, 0)
    assert np.array_equal(pair.receiver.load_each(np.arange(pair.receiver.words.num_words)), before)
    writer.fail()
    assert np.array_equal(pair.receiver.load_each(np.arange(pair.receiver.words.num_words)), before)


def test_a_lane_is_used_once(pair: Pair) -> None:
    grant = pair.open(end=16)
    first, second = pair.writer(grant, 0, 0, 16), pair.writer(grant, 0, 0, 16)
    first.claim()
    with pytest.raises(TransferFailed, match="held"):
        second.claim()
    first.finish()

    with pytest.raises(TransferFailed, match="used"):
        second.claim()

    assert not pair.receiver.is_held(0, 0)


def test_a_grant_closed_on_the_way_stops_its_writer_before_the_next_layer(pair: Pair) -> None:
    grant = pair.open(end=16)
    writer = pair.writer(grant, 0, 0, 16)
    writer.claim()
    writer.put_layer(0, pair.source_blocks, 0, 16)
    pair.table.close(grant.grant_id, now=0.0)
    before = data_of(pair.receiver)

    with pytest.raises(TransferFailed, match="closed"):
        writer.put_layer(1, pair.source_blocks, 0, 16)

    assert np.array_equal(data_of(pair.receiver), before)
    assert pair.receiver.is_held(0, 0)
    writer.fail()
    assert not pair.receiver.is_held(0, 0)


def test_each_layer_goes_in_order(pair: Pair) -> None:
    grant = pair.open(end=16)
    writer = pair.writer(grant, 0, 2, 16)
    writer.claim()
    writer.put_layer(0, pair.source_blocks, 0, 6)

    for lo, hi in ((5, 9), (7, 9)):
        with pytest.raises(InternalError, match="does not follow"):
            writer.put_layer(0, pair.source_blocks, lo, hi)
    assert pair.table.frontier(grant.grant_id, 0) == 0

    assert writer.put_layer(0, pair.source_blocks, 16, 20) == 0
    assert writer.put_layer(1, pair.source_blocks, 0, 2) == 0
    writer.put_layer(0, pair.source_blocks, 6, 99)
    writer.finish()


@pytest.mark.parametrize("end_with", ["finish", "fail"])
def test_nothing_is_written_after_the_end(pair: Pair, end_with: str) -> None:
    grant = pair.open(end=16)
    writer = pair.writer(grant, 0, 0, 16)
    writer.claim()
    getattr(writer, end_with)()
    before = pair.receiver.load_each(np.arange(pair.receiver.words.num_words))

    writer.finish()
    writer.fail()
    for call in (
        writer.claim,
        lambda: writer.put_layer(0, pair.source_blocks, 0, 16),
        lambda: writer.set_first_token(1),
    ):
        with pytest.raises(InternalError):
            call()

    assert np.array_equal(pair.receiver.load_each(np.arange(pair.receiver.words.num_words)), before)
    assert (data_of(pair.receiver) == POISON_BYTE).all()


def test_nothing_is_written_before_the_claim(pair: Pair) -> None:
    writer = pair.writer(pair.open(end=16), 0, 0, 16)

    with pytest.raises(InternalError):
        writer.put_layer(0, pair.source_blocks, 0, 16)
    with pytest.raises(InternalError):
        writer.set_first_token(1)

    assert (data_of(pair.receiver) == POISON_BYTE).all()


def test_a_writer_that_gives_up_poisons_its_lane(pair: Pair) -> None:
    grant = pair.open(end=16)
    writer = pair.writer(grant, 3, 0, 16)
    writer.claim()
    writer.put_layer(0, pair.source_blocks, 0, 8)
    assert pair.table.poisoned(grant.grant_id) is None

    writer.fail()

    reason = pair.table.poisoned(grant.grant_id)
    assert reason is not None
    assert "lane 3" in reason
    assert "gave up" in reason
    assert pair.table.frontier(grant.grant_id, 0) == 8


def test_an_empty_part_may_still_bring_the_first_token(pair: Pair) -> None:
    grant = pair.open(matched=16, end=16)
    writer = pair.writer(grant, 0, 0, 16)
    writer.claim()
    assert writer.put_layer(0, pair.source_blocks, 0, 16) == 0
    writer.set_first_token(49_151)
    writer.finish()

    assert pair.table.is_complete(grant.grant_id)
    assert pair.table.first_token(grant.grant_id) == 49_151
    assert pair.table.poisoned(grant.grant_id) is None


@pytest.mark.parametrize(
    ("lane", "change", "error"),
    [
        (-1, {}, InvalidRequest),
        (MAX_LANES, {}, InvalidRequest),
        (0, {"slot": -1}, InvalidRequest),
        (0, {"slot": 256}, InvalidRequest),
        (0, {"heap": HeapAddress("memory", "memory", 0, 0, 0, 77)}, TransferFailed),
    ],
)
def test_a_lane_that_does_not_exist_is_refused(
    pair: Pair, lane: int, change: dict[str, object], error: type[MeshError]
) -> None:
    grant = msgspec.structs.replace(pair.open(end=16), **change)

    with pytest.raises(error):
        pair.writer(grant, lane, 0, 16)


def test_the_same_chunk_of_another_table_is_planned_anew(pair: Pair) -> None:
    grant = pair.open(end=4)
    writer = pair.writer(grant, 0, 0, 4)
    writer.claim()
    writer.put_layer(0, [pair.source_blocks[0]], 0, 4)
    moved = pair.source_blocks[5]
    fill(pair.sender, [moved], 4, seed=6)
    writer.put_layer(1, [moved], 0, 4)
    writer.finish()

    assert not mismatches(pair.receiver, grant.blocks, 0, 0, 4, seed=5, layers=[0])
    assert not mismatches(pair.receiver, grant.blocks, 0, 0, 4, seed=6, layers=[1])
