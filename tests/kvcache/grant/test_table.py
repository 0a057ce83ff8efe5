from __future__ import annotations

from collections.abc import Iterator

import pytest

from microserve.kvcache.grant.table import Discharged, Expired, Settled
from microserve.kvcache.words import CLOSED, MAX_GENERATION, pack_state
from microserve.protocol.errors import CacheFull, InternalError, TransferFailed, UnknownRequest
from tests.support.kvcache.grant_world import NUM_SLOTS, Receiver


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.check()


def test_a_settled_grant_hands_its_blocks_over(receiver: Receiver) -> None:
    grant = receiver.open(matched=8)
    table = receiver.table.block_table(grant.grant_id)
    writer = receiver.writer(grant)
    writer.claim()
    receiver.put_all(writer)

    receiver.table.consume(grant.grant_id)
    receiver.table.seal(grant.grant_id)
    assert not receiver.table.is_settled(grant.grant_id)
    assert receiver.table.poll(0.0) == []
    receiver.check()
    writer.finish()

    assert receiver.table.is_settled(grant.grant_id)
    assert receiver.table.poll(0.0) == [Settled(grant.grant_id, "request")]
    assert [receiver.pool.ref_count(block) for block in table] == [1, 1, 1, 1]
    with pytest.raises(UnknownRequest):
        receiver.table.close(grant.grant_id, now=0.0)
    receiver.pool.free(table)
    assert receiver.pool.num_free == 12


def test_a_grant_is_sealed_only_when_all_is_in(receiver: Receiver) -> None:
    grant = receiver.open()

    with pytest.raises(InternalError, match="not complete"):
        receiver.table.seal(grant.grant_id)

    receiver.send(grant)
    receiver.table.seal(grant.grant_id)
    receiver.table.seal(grant.grant_id)
    with pytest.raises(TransferFailed, match="closed"):
        receiver.writer(grant, 1).claim()


def test_a_closed_grant_without_writers_frees_its_blocks_at_once(receiver: Receiver) -> None:
    grant = receiver.open(matched=4)

    receiver.table.close(grant.grant_id, now=0.0)

    assert receiver.pool.num_free == 12
    assert receiver.heap.load(receiver.heap.words.state(0)) == pack_state(1, CLOSED)
    assert receiver.table.poll(0.0) == []
    with pytest.raises(UnknownRequest):
        receiver.table.frontier(grant.grant_id, 0)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("how", ["finish", "fail", "kill"])
def test_a_closed_grant_with_a_writer_waits_in_quarantine(receiver: Receiver, how: str, sealed: bool) -> None:
    grant = receiver.open(matched=4)
    writer = receiver.writer(grant)
    writer.claim()
    receiver.put_all(writer)
    if sealed:
        receiver.table.seal(grant.grant_id)

    receiver.table.close(grant.grant_id, now=1.0)

    assert (receiver.pool.num_free, receiver.pool.num_quarantined) == (9, 3)
    assert receiver.table.poll(1e9) == []
    counts = receiver.table.counts(3.0)
    assert (counts.num_quarantined, counts.num_quarantined_blocks, counts.oldest_quarantine_s) == (1, 3, 2.0)
    with pytest.raises(UnknownRequest):
        receiver.table.frontier(grant.grant_id, 0)
    receiver.check()

    if how == "kill":
        receiver.registry.kill(receiver.sending.address.incarnation)
    else:
        getattr(writer, how)()

    assert receiver.table.poll(0.0) == [Discharged(grant.grant_id, "request", 3)]
    assert receiver.pool.num_free == 12
    assert receiver.table.poll(0.0) == []
    # As the run that they were, so that the next transfer merges their copies.
    assert receiver.pool.allocate(3) == grant.blocks


def test_every_writer_must_have_let_go(receiver: Receiver) -> None:
    grant = receiver.open()
    writers = [receiver.writer(grant, lane, 4 * lane, 4 * lane + 4) for lane in range(3)]
    for writer in writers:
        writer.claim()
    receiver.table.close(grant.grant_id, now=0.0)

    for writer in writers:
        assert receiver.table.poll(0.0) == []
        writer.finish()

    assert receiver.table.poll(0.0) == [Discharged(grant.grant_id, "request", 4)]


def test_an_unclaimed_lease_ends(receiver: Receiver) -> None:
    grant = receiver.open(now=10.0)
    writer = receiver.writer(grant)
    writer.claim()

    assert receiver.table.poll(14.9) == []
    assert receiver.table.poll(15.0) == [Expired(grant.grant_id, "request", "router")]
    assert receiver.pool.num_quarantined == 4

    writer.fail()
    assert receiver.table.poll(15.0) == [Discharged(grant.grant_id, "request", 4)]


def test_a_consumed_grant_has_no_lease(receiver: Receiver) -> None:
    grant = receiver.open()
    receiver.table.consume(grant.grant_id)

    assert receiver.table.poll(1e9) == []


def test_slots_run_out(receiver: Receiver) -> None:
    grants = [receiver.open(end=4) for _ in range(NUM_SLOTS)]
    blocks = receiver.pool.allocate(1)

    with pytest.raises(CacheFull) as caught:
        receiver.table.open("request", "router", [], 0, blocks, 4, now=0.0)

    assert caught.value.retry_after_s > 0
    assert receiver.pool.ref_count(blocks[0]) == 1
    receiver.table.close(grants[1].grant_id, now=0.0)
    assert receiver.table.open("request", "router", [], 0, blocks, 4, now=0.0).slot == grants[1].slot


def test_a_worn_out_slot_is_not_used_again(receiver: Receiver) -> None:
    for slot in range(NUM_SLOTS - 1):
        receiver.table._generations[slot] = MAX_GENERATION - 1
        receiver.heap.store(receiver.heap.words.state(slot), pack_state(MAX_GENERATION - 1, CLOSED))
    for _ in range(NUM_SLOTS):
        grant = receiver.open(end=4)
        receiver.send(grant, end=4)
        assert receiver.table.is_complete(grant.grant_id)
        receiver.table.close(grant.grant_id, now=0.0)

    assert [receiver.open(end=4).slot] == [NUM_SLOTS - 1]
    assert receiver.table.counts(0.0).num_free_slots == 0


def test_grants_of_one_owner(receiver: Receiver) -> None:
    first, other, quarantined = (receiver.open(end=4, owner=owner) for owner in "aba")
    receiver.writer(quarantined, end=4).claim()
    receiver.table.close(quarantined.grant_id, now=0.0)

    assert receiver.table.owned_by("a") == [first.grant_id]
    assert receiver.table.owned_by("b") == [other.grant_id]
    assert receiver.table.owned_by("c") == []


@pytest.mark.parametrize(
    ("matched", "matched_blocks", "blocks", "end"),
    [
        (0, [], [0], 5),
        (0, [], [0, 1], 4),
        (2, [], [0], 4),
        (4, [], [0], 8),
        (8, [0, 1], [], 4),
        (-4, [], [], 0),
    ],
)
def test_open_takes_only_blocks_that_fit(
    receiver: Receiver, matched: int, matched_blocks: list[int], blocks: list[int], end: int
) -> None:
    with pytest.raises(InternalError, match="open"):
        receiver.table.open("request", "router", matched_blocks, matched, blocks, end, now=0.0)


def test_integrity_notices_shared_blocks_of_an_unsettled_grant(receiver: Receiver) -> None:
    grant = receiver.open()
    receiver.pool.share(grant.blocks[:1])

    with pytest.raises(InternalError, match="block 0 of open grant"):
        receiver.table.check_integrity()

    receiver.pool.free(grant.blocks[:1])
