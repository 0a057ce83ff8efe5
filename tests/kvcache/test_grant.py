from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.grant import Discharged, Expired, GrantTable, Settled
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.heap.memory import MemoryHeap, MemoryPeerHeap, MemoryRegistry
from microserve.kvcache.layout import K
from microserve.kvcache.transfer import LaneWriter
from microserve.kvcache.words import CLOSED, MAX_GENERATION, OPEN, pack_state
from microserve.protocol.errors import CacheFull, InternalError, TransferFailed, UnknownRequest
from microserve.protocol.grant import Grant
from tests.kvcache.kv_samples import fill, is_painted, make_layout, mismatches, paint

RECEIVER = 9
LEASE_S = 5.0
NUM_SLOTS = 3
SEED = 4


class HookedPeer(MemoryPeerHeap):
    """Lets the world move on at the two moments of a claim that matter."""

    def __init__(self, writer: MemoryHeap, owner: MemoryHeap, registry: MemoryRegistry) -> None:
        super().__init__(writer, owner, registry)
        self.before_hold: Callable[[], None] = lambda: None
        self.after_hold: Callable[[], None] = lambda: None
        self.before_put: Callable[[], None] = lambda: None

    def hold(self, slot: int, lane: int) -> bool:
        self.before_hold()
        is_mine = super().hold(slot, lane)
        self.after_hold()
        return is_mine

    def put(self, *arguments, **named) -> None:  # type: ignore[no-untyped-def]
        self.before_put()
        super().put(*arguments, **named)


class HookedHeap(MemoryHeap):
    after_asked: Callable[[], None] = staticmethod(lambda: None)

    def is_held(self, slot: int, lane: int) -> bool:
        answer = super().is_held(slot, lane)
        self.after_asked()
        return answer


class Receiver:
    """A receiving engine with 12 blocks of 4 tokens, and senders that come and go."""

    def __init__(self) -> None:
        self.registry = MemoryRegistry()
        self.heap = HookedHeap(
            make_layout(num_blocks=12), incarnation=RECEIVER, registry=self.registry, num_slots=NUM_SLOTS
        )
        self.pool = BlockPool(12)
        self.table = self.make_table(self.heap)
        self.source_blocks = [3, 0, 2, 1]
        self._senders = 100

    def make_table(self, heap: Heap) -> GrantTable:
        return GrantTable(
            *(heap, self.pool),
            engine_id="e",
            incarnation=RECEIVER,
            lease_s=LEASE_S,
            verify_checksums=True,
        )

    def open(self, *, matched: int = 0, end: int = 16, now: float = 0.0, owner: str = "router") -> Grant:
        matched_blocks = self.pool.allocate(matched // 4)
        blocks = self.pool.allocate(self.heap.layout.num_blocks_for(end - matched))
        return self.table.open("request", owner, matched_blocks, matched, blocks, end, now)

    def sender(self) -> HookedPeer:
        """A new process, with 16 tokens of KV, attached."""
        self._senders += 1
        self.sending = MemoryHeap(make_layout(), incarnation=self._senders, registry=self.registry)
        fill(self.sending, self.source_blocks, 16, SEED)
        return HookedPeer(self.sending, self.heap, self.registry)

    def writer(
        self, grant: Grant, lane: int = 0, begin: int = 0, end: int = 16, *, checksums: bool = True
    ) -> LaneWriter:
        peer = self.sender()
        return LaneWriter(self.sending, peer, grant, lane, begin, min(end, grant.end), checksums=checksums)

    def send(self, grant: Grant, lane: int = 0, begin: int = 0, end: int = 16) -> None:
        """A whole transfer of one lane."""
        writer = self.writer(grant, lane, begin, end)
        writer.claim()
        self.put_all(writer, begin, end)
        writer.finish()

    def put_all(self, writer: LaneWriter, begin: int = 0, end: int = 16) -> None:
        for layer in range(2):
            writer.put_layer(layer, self.source_blocks, begin, end)

    def check(self) -> None:
        self.table.check_integrity()
        self.pool.check_integrity()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.check()


# --- arrival


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


# --- life


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


# --- the races


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
