from __future__ import annotations

from collections.abc import Iterator

import pytest

from microserve.kvcache.grant.table import Settled
from microserve.kvcache.layout import K
from microserve.kvcache.words import OPEN, pack_state
from microserve.protocol.errors import InternalError, TransferFailed
from microserve.protocol.messages.kv.grant import Grant
from tests.support.kvcache.grant_world import LEASE_S, NUM_SLOTS, RECEIVER, SEED, Receiver
from tests.support.kvcache.kv_samples import mismatches


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.check()


def test_a_grant_says_all_that_a_sender_needs(receiver: Receiver) -> None:
    grant = receiver.open(matched=4, end=15)

    assert grant == Grant(
        grant_id=f"e/{RECEIVER:x}/0/1",
        engine_id="e",
        incarnation=RECEIVER,
        slot=0,
        generation=1,
        matched=4,
        end=15,
        blocks=[1, 2, 3],
        block_size=4,
        layout_hash=receiver.heap.layout.layout_hash,
        heap=receiver.heap.address,
        lease_s=LEASE_S,
        geometry=receiver.heap.layout.geometry,
    )
    assert receiver.table.grant(grant.grant_id) == grant
    assert receiver.table.block_table(grant.grant_id) == [0, 1, 2, 3]
    assert receiver.heap.load(receiver.heap.words.state(0)) == pack_state(1, OPEN)


def test_the_frontier_follows_each_layer(receiver: Receiver) -> None:
    grant = receiver.open()
    writer = receiver.writer(grant)
    writer.claim()

    writer.put_layer(0, receiver.source_blocks, 0, 5)
    writer.put_layer(1, receiver.source_blocks, 0, 5)
    writer.put_layer(0, receiver.source_blocks, 5, 16)

    assert [receiver.table.frontier(grant.grant_id, layer) for layer in range(2)] == [16, 5]
    assert receiver.table.layer_complete(grant.grant_id, 0)
    assert not receiver.table.layer_complete(grant.grant_id, 1)
    assert not receiver.table.is_complete(grant.grant_id)

    writer.put_layer(1, receiver.source_blocks, 5, 16)

    assert receiver.table.is_complete(grant.grant_id)
    writer.finish()


def test_lanes_meet_in_the_middle_of_a_block_in_any_order(receiver: Receiver) -> None:
    grant = receiver.open(matched=4)
    frontiers = []

    for lane, (begin, end) in enumerate([(10, 16), (7, 9), (4, 7), (9, 10)]):
        receiver.send(grant, lane, begin, end)
        frontiers.append(receiver.table.frontier(grant.grant_id, 1))

    assert frontiers == [4, 4, 9, 16]
    for layer in range(2):
        receiver.table.verify(grant.grant_id, layer)
    assert not mismatches(receiver.heap, grant.blocks, 4, 4, 16, SEED)


def test_lanes_may_overlap(receiver: Receiver) -> None:
    grant = receiver.open()
    receiver.send(grant, 0, 0, 10)
    receiver.send(grant, 1, 4, 16)

    assert receiver.table.is_complete(grant.grant_id)
    receiver.table.verify(grant.grant_id, 0)
    assert not mismatches(receiver.heap, grant.blocks, 0, 0, 16, SEED)


def test_what_an_earlier_use_of_the_slot_left_counts_for_nothing(receiver: Receiver) -> None:
    for _ in range(NUM_SLOTS):
        grant = receiver.open(end=12)
        writer = receiver.writer(grant)
        writer.claim()
        receiver.put_all(writer, 0, 12)
        writer.set_first_token(7)
        writer.fail()
        receiver.table.close(grant.grant_id, now=0.0)

    again = receiver.open(end=12)

    assert (again.slot, again.generation) == (0, 2)
    assert receiver.table.frontier(again.grant_id, 0) == 0
    assert receiver.table.first_token(again.grant_id) is None
    assert receiver.table.poisoned(again.grant_id) is None


def test_a_whole_match_is_complete_at_once(receiver: Receiver) -> None:
    grant = receiver.open(matched=16, end=16)

    assert receiver.table.is_complete(grant.grant_id)
    receiver.table.verify(grant.grant_id, 1)
    receiver.table.seal(grant.grant_id)
    assert receiver.table.poll(0.0) == [Settled(grant.grant_id, "request")]


@pytest.mark.parametrize("how", ["finish", "kill"])
def test_a_writer_that_is_gone_too_early_is_noticed(receiver: Receiver, how: str) -> None:
    grant = receiver.open()
    writer = receiver.writer(grant, 1)
    writer.claim()
    writer.put_layer(0, receiver.source_blocks, 0, 16)
    assert receiver.table.poisoned(grant.grant_id) is None

    if how == "finish":
        writer.finish()
    else:
        receiver.registry.kill(receiver.sending.address.incarnation)

    reason = receiver.table.poisoned(grant.grant_id)
    assert reason is not None
    assert f"lane 1: the writer {receiver.sending.address.incarnation:#x} is gone" in reason


def test_a_writer_that_did_its_part_may_go(receiver: Receiver) -> None:
    grant = receiver.open()
    receiver.send(grant, 0, 0, 8)

    assert receiver.table.poisoned(grant.grant_id) is None


@pytest.mark.parametrize(("end", "is_gone"), [(16, True), (8, False)])
def test_a_writer_of_the_end_that_leaves_no_first_token_is_noticed(
    receiver: Receiver, end: int, is_gone: bool
) -> None:
    grant = receiver.open()
    writer = receiver.writer(grant, 0, 0, end)
    writer.claim()
    receiver.put_all(writer, 0, end)
    assert receiver.table.poisoned(grant.grant_id, await_first=True) is None

    writer.finish()

    assert (receiver.table.poisoned(grant.grant_id, await_first=True) is not None) == is_gone
    assert receiver.table.poisoned(grant.grant_id) is None


# --- verify


def test_a_layer_is_not_verified_before_it_is_complete(receiver: Receiver) -> None:
    grant = receiver.open()

    with pytest.raises(InternalError, match="layer 0"):
        receiver.table.verify(grant.grant_id, 0)


@pytest.mark.parametrize("token", [0, 5, 15])
def test_one_flipped_bit_is_found(receiver: Receiver, token: int) -> None:
    grant = receiver.open()
    receiver.send(grant)
    at = receiver.heap.layout.offset(1, grant.blocks[token // 4], K, token % 4)
    receiver.heap.data[at] ^= 1

    receiver.table.verify(grant.grant_id, 0)
    with pytest.raises(TransferFailed, match=r"layer 1, lane 0, tokens \[0, 16\), blocks \[0, 1, 2, 3\]"):
        receiver.table.verify(grant.grant_id, 1)


def test_without_checksums_only_tags_are_compared(receiver: Receiver) -> None:
    grant = receiver.open()
    writer = receiver.writer(grant, checksums=False)
    writer.claim()
    receiver.put_all(writer)
    writer.finish()
    receiver.heap.data[0] ^= 1

    receiver.table.verify(grant.grant_id, 0)


def test_a_block_last_written_under_another_grant_is_found(receiver: Receiver) -> None:
    stale = receiver.open(end=8)
    receiver.send(stale, 0, 0, 8)
    tag_word = receiver.heap.words.tags(0, stale.blocks)[0]
    stale_tag = receiver.heap.load(tag_word)
    grant = receiver.open(end=8)
    receiver.send(grant, 0, 0, 8)
    receiver.table.verify(grant.grant_id, 1)

    receiver.heap.store(receiver.heap.words.tags(1, grant.blocks)[1], stale_tag)

    with pytest.raises(TransferFailed, match=f"layer 1, block {grant.blocks[1]}"):
        receiver.table.verify(grant.grant_id, 1)


def test_nobody_asks_who_holds_a_lane_that_its_writer_may_be_taking(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To ask takes the lane for a moment in shared memory, and its writer's ``hold`` would fail (heap.py)."""
    asked: list[int] = []
    is_held = receiver.heap.is_held

    def ask(slot: int, lane: int) -> bool:
        asked.append(lane)
        return is_held(slot, lane)

    grant = receiver.open()
    writer = receiver.writer(grant, lane=2)
    monkeypatch.setattr(receiver.heap, "is_held", ask)

    assert receiver.table.poisoned(grant.grant_id) is None
    assert asked == []

    writer.claim()
    assert receiver.table.poisoned(grant.grant_id) is None
    assert asked == [2]

    writer.fail()
    assert receiver.table.poisoned(grant.grant_id) is not None
