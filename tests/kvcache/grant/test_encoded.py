"""Lanes that bring payloads of a codec: what counts, and when; what is refused; who may write beside them."""

from __future__ import annotations

import numpy as np
import pytest

from microserve.kvcache.codec.frame import HEADER_NBYTES
from microserve.kvcache.grant.table import Discharged, Settled
from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.heap.local import MemoryPeerHeap
from microserve.protocol.errors import InternalError, TransferFailed
from tests.support.kvcache.encoded import LOSSY, EncodedWorld, read_rows, rows_of

pytestmark = pytest.mark.quick


@pytest.fixture
def world() -> EncodedWorld:
    return EncodedWorld()


def test_nothing_counts_before_it_is_decoded(world: EncodedWorld) -> None:
    rows, grant = rows_of(world.heap.layout, 14, seed=1), world.open(end=14)
    writer = world.send(grant, rows)
    writer.finish()
    assert world.table.frontier(grant.grant_id, 0) == 0

    world.table.poll(0.0)
    assert not world.table.is_complete(grant.grant_id)
    assert world.table.poisoned(grant.grant_id) is None, "its writer is gone, and all of it is here"
    world.decoder.work()

    assert world.table.is_complete(grant.grant_id)
    world.table.verify(grant.grant_id, 0)
    world.table.verify(grant.grant_id, 1)
    assert not world.table.is_lossy(grant.grant_id)
    assert np.array_equal(read_rows(world.heap, grant.blocks, 14), rows)
    world.table.seal(grant.grant_id)
    assert world.table.poll(0.0) == [Settled(grant.grant_id, "r")]
    world.check()


def test_a_payload_leaves_rows_behind_its_end_alone(world: EncodedWorld) -> None:
    """The receiver computes the rest of the last block meanwhile."""
    rows, grant = rows_of(world.heap.layout, 14, seed=1), world.open(end=14)
    world.heap.data[:] = 0xAB
    world.send(grant, rows)
    last = grant.blocks[-1:]
    tail = read_rows(world.heap, last, 4)[:, :, 2:].copy()
    assert (tail == 0xAB).all()
    world.table.poll(0.0)
    world.decoder.work()
    assert (read_rows(world.heap, last, 4)[:, :, 2:] == 0xAB).all()


def test_rows_and_payloads_in_one_lane_count_in_their_order(world: EncodedWorld) -> None:
    rows, grant = rows_of(world.heap.layout, 23, seed=3), world.open(end=23, matched=4)
    writer = world.writer(grant, rows)
    writer.claim()
    assert writer.is_encoded
    assert writer.put_layer(0, range(6), 0, 7) == 0, "no block is whole but the one that is matched"
    writer.put_layer(0, range(6), 0, 10)
    world.table.poll(0.0)
    world.decoder.work()
    assert world.table.frontier(grant.grant_id, 0) == 8

    writer.put_payload(0, world.payload(0, rows, 8, 16), 8, 16)
    writer.put_layer(0, range(6), 16, 20)
    world.decoder.work()
    assert world.table.frontier(grant.grant_id, 0) == 20
    writer.put_layer(0, range(6), 20, 23)
    writer.put_payload(1, world.payload(1, rows, 4, 20), 4, 20)
    writer.put_layer(1, range(6), 20, 23)
    writer.finish()
    world.decoder.work()

    assert world.table.is_complete(grant.grant_id)
    for layer in range(2):
        world.table.verify(grant.grant_id, layer)
    assert np.array_equal(read_rows(world.heap, grant.blocks, 19), rows[:, :, 4:])


def test_what_loses_is_known_and_needs_leave(world: EncodedWorld) -> None:
    rows = rows_of(world.heap.layout, 16, seed=4)
    exact, free = world.open(), world.open(may_lose=True)
    for grant in (exact, free):
        world.send(grant, rows, LOSSY).finish()
    world.table.poll(0.0)
    world.decoder.work()

    assert world.table.is_complete(free.grant_id)
    assert world.table.is_lossy(free.grant_id)
    assert not world.table.is_complete(exact.grant_id)
    assert "allows no loss" in (world.table.poisoned(exact.grant_id) or "")
    assert not world.table.is_lossy(exact.grant_id)


@pytest.mark.parametrize("place", [0, 4, 20, HEADER_NBYTES + 3])
def test_a_torn_payload_fails_the_grant_and_no_other(world: EncodedWorld, place: int) -> None:
    rows, grant, other = rows_of(world.heap.layout, 16, seed=5), world.open(), world.open()
    writer = world.writer(grant, rows)
    writer.claim()
    torn = world.payload(0, rows, 0, 16)
    torn[place] ^= 1
    writer.put_payload(0, torn, 0, 16)
    world.send(other, rows)
    world.table.poll(0.0)
    before = read_rows(world.heap, grant.blocks, 16).copy()
    world.decoder.work()

    assert world.table.frontier(grant.grant_id, 0) == 0
    assert "lane 0: layer 0" in (world.table.poisoned(grant.grant_id) or "")
    assert np.array_equal(read_rows(world.heap, grant.blocks, 16), before), "nothing was written"
    assert world.table.is_complete(other.grant_id)
    world.table.close(grant.grant_id, 1.0)
    writer.fail()
    assert world.table.poll(1.0) == [Discharged(grant.grant_id, "r", 4)]
    world.check()


@pytest.mark.parametrize("profile", ["another layer's", "too many tokens", "no payload"])
def test_what_is_no_payload_of_these_tokens_fails_the_grant(world: EncodedWorld, profile: str) -> None:
    rows, grant = rows_of(world.heap.layout, 32, seed=6), world.open()
    writer = world.writer(grant, rows[:, :, :16])
    writer.claim()
    payload = {
        "another layer's": world.payload(1, rows, 0, 16),
        "too many tokens": world.payload(0, rows, 0, 32, LOSSY),
        "no payload": np.full(1000, 7, np.uint8),
    }[profile]
    writer.put_payload(0, payload[:2000], 0, 16)
    world.table.poll(0.0)
    world.decoder.work()
    assert world.table.poisoned(grant.grant_id) is not None
    assert world.table.frontier(grant.grant_id, 0) == 0


def test_a_grant_that_is_closed_while_its_decoder_works_keeps_its_blocks(world: EncodedWorld) -> None:
    rows, grant = rows_of(world.heap.layout, 16, seed=7), world.open()
    world.send(grant, rows).finish()
    world.table.poll(0.0)
    [lane] = world.decoder.lanes
    decode, seen = lane._decode, []

    def slow(*arguments):  # type: ignore[no-untyped-def]
        world.table.close(grant.grant_id, 1.0)
        seen.append((world.pool.num_quarantined, world.table.poll(1.0)))
        return decode(*arguments)

    lane._decode = slow
    world.decoder.work()

    assert seen == [(4, [])], "in quarantine, and there it stays"
    assert not lane.advance(), "no further piece is begun"
    assert world.table.poll(1.0) == [Discharged(grant.grant_id, "r", 4)]
    assert world.pool.num_free == 12
    world.check()


def test_an_encoded_lane_ends_where_blocks_do(world: EncodedWorld) -> None:
    rows, grant = rows_of(world.heap.layout, 15, seed=8), world.open(end=15)
    for begin, end, is_encoded in ((0, 8, True), (8, 15, True), (0, 7, False), (5, 15, False)):
        assert world.writer(grant, rows, begin=begin, end=end).is_encoded is is_encoded
    writer = world.writer(grant, rows, end=7)
    writer.claim()
    with pytest.raises(InternalError, match="put_payload"):
        writer.put_payload(0, world.payload(0, rows, 0, 15, LOSSY), 0, 7)


def test_no_other_lane_may_bring_an_encoded_one_s_tokens(world: EncodedWorld) -> None:
    rows, grant = rows_of(world.heap.layout, 16, seed=9), world.open()
    plain = world.writer(grant, rows, lane=1, begin=4, encoded=False)
    plain.claim()
    for layer in range(2):
        plain.put_layer(layer, range(4), 0, 16)
    assert world.table.frontier(grant.grant_id, 0) == 0

    late = world.writer(grant, rows, lane=0, end=8)
    with pytest.raises(TransferFailed, match="lane 1 brings some of its tokens"):
        late.claim()
    assert not world.heap.is_held(grant.slot, 0)
    assert "another one brings" in (world.table.poisoned(grant.grant_id) or "")
    beside = world.writer(world.open(), rows, lane=0, end=8)
    beside.claim()


def test_a_plain_lane_over_an_encoded_one_counts_for_nothing(world: EncodedWorld) -> None:
    """Who puts rows does not look: the receiver does."""
    rows, grant = rows_of(world.heap.layout, 16, seed=10), world.open()
    encoded = world.writer(grant, rows, lane=0)
    encoded.claim()
    plain = world.writer(grant, rows, lane=1, encoded=False)
    plain.claim()
    for layer in range(2):
        plain.put_layer(layer, range(4), 0, 16)
    world.table.poll(0.0)
    assert world.table.frontier(grant.grant_id, 0) == 0
    assert not world.table.is_complete(grant.grant_id)
    assert "another one brings" in (world.table.poisoned(grant.grant_id) or "")


class WithoutPayloads(MemoryPeerHeap):
    takes_payloads = False


def test_a_heap_that_takes_no_payloads_is_sent_rows(world: EncodedWorld) -> None:
    rows, grant = rows_of(world.heap.layout, 16, seed=11), world.open()
    sender = world.sender(rows)
    peer = WithoutPayloads(sender, world.heap, world.registry)
    writer = LaneWriter(sender, peer, grant, 0, 0, 16, encoded=True)
    assert not writer.is_encoded
    writer.claim()
    for layer in range(2):
        writer.put_layer(layer, range(4), 0, 16)
    assert world.table.is_complete(grant.grant_id)


def test_an_encoded_lane_where_nothing_is_decoded_fails_the_grant() -> None:
    world = EncodedWorld()
    world.table._decoder = None
    rows, grant = rows_of(world.heap.layout, 16, seed=12), world.open()
    assert grant.decoding is None
    world.send(grant, rows)
    assert world.table.poll(0.0) == []
    assert not world.table.is_complete(grant.grant_id)
    assert "nothing is decoded here" in (world.table.poisoned(grant.grant_id) or "")
