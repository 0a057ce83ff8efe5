"""Grants closed at the worst moments of a writer. Each test names one."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from microserve.kvcache.grant.table import Discharged
from microserve.kvcache.grant.writer import LaneWriter
from microserve.protocol.errors import CacheFull, TransferFailed
from tests.support.kvcache.grant_world import NUM_SLOTS, RECEIVER, SEED, Receiver
from tests.support.kvcache.kv_samples import is_painted, mismatches, paint


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.check()


def test_a_late_put_lands_in_quarantine(receiver: Receiver) -> None:
    """The grant is closed while its writer is between its look at STATE and its put."""
    grant = receiver.open()
    peer = receiver.sender()
    writer = LaneWriter(receiver.sending, peer, grant, 0, 0, 16)
    writer.claim()
    others: list[int] = []

    def close_and_reuse() -> None:
        receiver.table.close(grant.grant_id, now=0.0)
        receiver.table.poll(1e9)
        assert receiver.pool.num_free == 8
        others.extend(receiver.pool.allocate(8))
        assert not set(others) & set(grant.blocks)
        paint(receiver.heap, others, 0xAA)
        with pytest.raises(CacheFull):
            receiver.pool.allocate(1)
        receiver.check()

    peer.before_put = close_and_reuse
    writer.put_layer(0, receiver.source_blocks, 0, 16)
    peer.before_put = lambda: None

    assert not mismatches(receiver.heap, grant.blocks, 0, 0, 16, SEED, layers=[0])
    assert is_painted(receiver.heap, others, 0xAA)
    assert receiver.table.poll(0.0) == []
    with pytest.raises(TransferFailed, match="closed"):
        writer.put_layer(1, receiver.source_blocks, 0, 16)
    writer.fail()
    assert receiver.table.poll(0.0) == [Discharged(grant.grant_id, "request", 4)]
    assert sorted(receiver.pool.allocate(4)) == sorted(grant.blocks)


def test_a_claim_that_sleeps_before_it_holds_finds_the_slot_taken_by_another(receiver: Receiver) -> None:
    """The slot serves another grant, whose writer is at work in the same lane, when the late one wakes."""
    stale = receiver.open(end=4)
    peer = receiver.sender()
    late = LaneWriter(receiver.sending, peer, stale, 0, 0, 4)
    new: list[LaneWriter] = []

    def recycle() -> None:
        receiver.table.close(stale.grant_id, now=0.0)
        for _ in range(NUM_SLOTS - 1):
            receiver.table.close(receiver.open(end=4).grant_id, now=0.0)
        grant = receiver.open(end=4)
        assert grant.slot == stale.slot
        new.append(receiver.writer(grant))
        new[0].claim()

    peer.before_hold = recycle
    words = receiver.heap.words
    with pytest.raises(TransferFailed, match="held"):
        late.claim()

    assert receiver.heap.load(words.claim(0, 0)) >> 8 == 2
    receiver.table.close(f"e/{RECEIVER:x}/0/2", now=0.0)
    assert receiver.pool.num_quarantined == 1
    late.finish()
    assert receiver.table.poll(0.0) == []
    new[0].finish()
    assert len(receiver.table.poll(0.0)) == 1


def test_a_claim_of_a_recycled_slot_writes_nothing(receiver: Receiver) -> None:
    stale = receiver.open(end=4)
    peer = receiver.sender()
    late = LaneWriter(receiver.sending, peer, stale, 0, 0, 4)

    def recycle() -> None:
        receiver.table.close(stale.grant_id, now=0.0)
        for _ in range(NUM_SLOTS):
            receiver.open(end=4)

    peer.before_hold = recycle
    before = receiver.heap.load_each(np.arange(receiver.heap.words.num_words))
    with pytest.raises(TransferFailed, match="closed"):
        late.claim()

    changed = np.flatnonzero(receiver.heap.load_each(np.arange(receiver.heap.words.num_words)) != before)
    assert changed.tolist() == [receiver.heap.words.state(slot) for slot in range(NUM_SLOTS)]
    assert not receiver.heap.is_held(0, 0)


def test_a_grant_closed_in_the_middle_of_a_claim_waits_for_it(receiver: Receiver) -> None:
    """Closed between hold and the look at STATE: quarantined although no claim is to be seen."""
    grant = receiver.open()
    peer = receiver.sender()
    writer = LaneWriter(receiver.sending, peer, grant, 0, 0, 16)

    def close() -> None:
        receiver.table.close(grant.grant_id, now=0.0)
        assert receiver.pool.num_quarantined == 4

    peer.after_hold = close
    with pytest.raises(TransferFailed, match="closed"):
        writer.claim()

    assert receiver.table.poll(0.0) == [Discharged(grant.grant_id, "request", 4)]


def test_a_claim_right_after_its_lane_was_found_free_finds_the_grant_closed(receiver: Receiver) -> None:
    grant = receiver.open()
    writers = [receiver.writer(grant, lane) for lane in range(4)]

    def claim() -> None:
        receiver.heap.after_asked = lambda: None
        for writer in writers:
            with pytest.raises(TransferFailed, match="closed"):
                writer.claim()

    receiver.heap.after_asked = claim
    receiver.table.close(grant.grant_id, now=0.0)

    assert receiver.pool.num_free == 12


def test_a_stale_grant_of_a_dead_engine_names_no_block_of_the_new_one(receiver: Receiver) -> None:
    grant = receiver.open()
    peer = receiver.sender()
    fresh = msgspec.structs.replace(grant, heap=msgspec.structs.replace(grant.heap, incarnation=RECEIVER + 1))

    with pytest.raises(TransferFailed, match="grant is for heap"):
        LaneWriter(receiver.sending, peer, fresh, 0, 0, 16)
