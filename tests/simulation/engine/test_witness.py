"""What no engine can see of one-sided writes is seen from outside, at once."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.grant.table import GrantTable
from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.heap.local import MemoryRegistry
from microserve.protocol.errors import TransferFailed
from microserve.protocol.messages.kv.grant import Grant
from microserve.services.simulation.engine.hash_runner import hash_layout
from microserve.services.simulation.engine.heap import FaultyHeap, WriteFaults
from microserve.services.simulation.engine.witness import Lane, Meeting, Moment, Witness
from tests.simulation.mutation.mutations import planted

RECEIVER, SENDER, OTHER = 1, 2, 3
NUM_BLOCKS, NUM_TOKENS = 8, 8


class Pair:
    """A receiver with one slot, and senders that write into it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.witness = Witness(lambda: self.now)
        self.watched: list[tuple[Moment, int]] = []
        self.witness.watcher = self._watch
        self._registry = MemoryRegistry()
        self.rung = 0
        self.pool = BlockPool(NUM_BLOCKS)
        self.heap = self.make_heap(RECEIVER)
        self.table = GrantTable(
            self.heap, self.pool, engine_id="e", incarnation=RECEIVER, lease_s=1.0, verify_checksums=True
        )
        self.witness.join(RECEIVER, self.table)

    def _watch(self, moment: Moment, writer: int, _lane: Lane, _generation: int) -> None:
        self.watched.append((moment, writer))

    def _ring(self) -> None:
        self.rung += 1

    def make_heap(self, incarnation: int) -> FaultyHeap:
        return FaultyHeap(
            hash_layout(num_blocks=NUM_BLOCKS),
            incarnation=incarnation,
            registry=self._registry,
            num_slots=1,
            faults=WriteFaults(random.Random(0), lambda seconds: None),
            witness=self.witness,
            ring=self._ring,
        )

    def open(self) -> Grant:
        return self.table.open("r", "o", [], 0, self.pool.allocate(2), NUM_TOKENS, self.now)

    def writer(self, grant: Grant, lane: int = 0, begin: int = 0, end: int = NUM_TOKENS) -> LaneWriter:
        heap = self.make_heap(SENDER + lane)
        return LaneWriter(heap, heap.attach(grant.heap), grant, lane, begin, end, checksums=True)

    def put_all(self, writer: LaneWriter, lo: int = 0, hi: int = NUM_TOKENS) -> None:
        for layer in range(2):
            writer.put_layer(layer, [0, 1], lo, hi)


@pytest.fixture
def pair() -> Iterator[Pair]:
    yield Pair()


def test_a_transfer_as_it_should_be(pair: Pair) -> None:
    grant = pair.open()
    writer = pair.writer(grant)
    writer.claim()
    pair.put_all(writer)
    pair.table.seal(grant.grant_id)
    writer.finish()
    pair.table.poll(pair.now)

    assert pair.witness.finish() == []
    assert [moment for moment, _ in pair.watched] == [
        Moment.CLAIM,
        Moment.LAYER,
        Moment.WHOLE,
        Moment.LET_GO,
    ]
    assert +pair.witness.met == {Meeting.SEALED_HELD: 1}
    assert pair.rung, "whoever waits for KV is told that some has come"


def test_lanes_that_meet_and_rows_behind_a_gap(pair: Pair) -> None:
    grant = pair.open()
    first, second = pair.writer(grant, 0, 0, 4), pair.writer(grant, 1, 4, 8)
    first.claim()
    second.claim()
    pair.put_all(second, 4, 8)

    assert pair.witness.met[Meeting.TWO_LANES] == 1
    assert pair.witness.met[Meeting.GAP] == 2, "in each layer"
    assert pair.witness.violations == []


def test_a_writer_that_is_too_late_is_counted(pair: Pair) -> None:
    grant = pair.open()
    writer = pair.writer(grant)
    pair.table.close(grant.grant_id, pair.now)
    pair.open()
    with pytest.raises(TransferFailed, match="closed"):
        writer.claim()

    assert pair.witness.met[Meeting.SLOT_AGAIN] == 1
    assert pair.witness.met[Meeting.LATE_MEETS_NEXT] == 1
    assert pair.witness.violations == []


def test_a_writer_that_takes_the_slot_s_next_grant_is_told(pair: Pair) -> None:
    grant = pair.open()
    writer = pair.writer(grant)
    pair.table.close(grant.grant_id, pair.now)
    pair.open()
    with planted("A late writer takes any open grant of the slot: the generation is not compared"):
        writer.claim()
        writer.put_layer(0, [0, 1], 0, NUM_TOKENS)

    claimed, wrote = pair.witness.violations
    assert "claimed lane 0" in claimed and "forgotten" in claimed
    assert "keep no more" in wrote


def test_a_grant_that_is_forgotten_under_its_writer_is_told(pair: Pair) -> None:
    grant = pair.open()
    writer = pair.writer(grant)
    writer.claim()
    pair.put_all(writer)
    pair.table.seal(grant.grant_id)
    with planted("A sealed grant settles while a writer still holds its lane"):
        pair.table.poll(pair.now)
    writer.finish()

    (held,) = pair.witness.violations
    assert "until now, and it is forgotten" in held


def test_a_layer_that_is_taken_for_whole_too_early_is_told(pair: Pair) -> None:
    grant = pair.open()
    first, second = pair.writer(grant, 0, 0, 4), pair.writer(grant, 1, 4, 8)
    first.claim()
    second.claim()
    pair.put_all(second, 4, 8)
    bug = "The frontier of two lanes is the furthest end, whatever lies before"
    with planted(bug), pytest.raises(TransferFailed):
        pair.table.verify(grant.grant_id, 0)

    (refuted,) = pair.witness.finish()
    assert "no write was spoilt" in refuted


def test_a_spoilt_write_may_be_refuted(pair: Pair) -> None:
    grant = pair.open()
    writer = pair.writer(grant)
    writer.claim()
    pair.put_all(writer)
    pair.heap.data[:] = 255
    pair.witness.spoilt(RECEIVER)
    with pytest.raises(TransferFailed, match="checksum"):
        pair.table.verify(grant.grant_id, 0)

    assert pair.witness.finish() == []


def test_who_dies_holds_nothing(pair: Pair) -> None:
    grant = pair.open()
    writer = pair.writer(grant)
    writer.claim()
    pair.witness.leave(SENDER)
    other = pair.writer(grant, 1)
    other.claim()

    assert pair.witness.met[Meeting.TWO_LANES] == 0
    pair.witness.leave(RECEIVER)
    other.finish()
    assert pair.witness.violations == []
