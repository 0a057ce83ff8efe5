from __future__ import annotations

import itertools
import os

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.grant.table import GrantTable
from microserve.kvcache.grant.writer import LaneWriter, TransferPlan
from microserve.kvcache.heap.heap import Copies, Copy
from microserve.kvcache.heap.local import MemoryHeap, MemoryRegistry
from microserve.kvcache.layout import K, V
from microserve.protocol.errors import (
    InternalError,
    InvalidInterval,
    InvalidRequest,
    MeshError,
    TransferFailed,
)
from microserve.protocol.messages.kv.grant import Grant, HeapAddress
from tests.support.examples import examples
from tests.support.kvcache.kv_samples import POISON_BYTE, fill, make_layout, row

SENDER, RECEIVER = 1, 2


def make_grant(*, matched: int = 0, end: int, blocks: list[int], num_blocks: int = 8) -> Grant:
    layout = make_layout(num_blocks=num_blocks)
    return Grant(
        *("g", "engine", RECEIVER, 0, 1, matched, end, blocks, layout.block_size, layout.layout_hash),
        heap=HeapAddress("memory", "memory", 0, 0, 0, RECEIVER),
        lease_s=1.0,
    )


@given(st.data())
def test_merging_changes_no_byte(data: st.DataObject) -> None:
    """Blocks of 8 bytes in any order, rarely neighbours, against copying them one by one."""
    order = data.draw(st.permutations(range(12)))
    targets = data.draw(st.permutations(range(12)))
    count = data.draw(st.integers(0, 12))
    source, expected, found = bytes(os.urandom(96)), bytearray(96), bytearray(96)
    single = [Copy(8 * s, 8 * t, 8) for s, t in zip(order[:count], targets, strict=False)]
    for copy in single:
        expected[copy.target : copy.target + 8] = source[copy.source : copy.source + 8]

    copies = Copies(single)

    for target_slice, source_slice in copies.slices:
        found[target_slice] = source[source_slice]
    assert found == expected
    assert copies.nbytes == 8 * count


@pytest.mark.parametrize("step", [1, -1])
def test_a_run_of_blocks_is_one_copy_whichever_way_it_runs(step: int) -> None:
    plan = TransferPlan(
        make_layout(num_blocks=12), make_layout(), make_grant(end=16, blocks=[2, 3, 4, 5][::step]), 0, 16
    )

    copies = plan.copies([7, 8, 9, 10][::step], 0, 16)

    nbytes = make_layout().block_nbytes
    assert copies.copies == (Copy(7 * nbytes, 2 * nbytes, 4 * nbytes),)


def test_a_part_of_a_block_is_two_copies() -> None:
    layout = make_layout()
    plan = TransferPlan(layout, layout, make_grant(end=4, blocks=[6]), 0, 4)

    copies = plan.copies([1], 1, 3)

    assert copies.copies == tuple(
        Copy(layout.offset(0, 1, kv, 1), layout.offset(0, 6, kv, 1), 2 * layout.row_nbytes) for kv in (K, V)
    )


# --- TransferPlan


@pytest.mark.parametrize(
    ("begin", "end", "field"), [(-1, 4, "begin"), (5, 4, "begin"), (0, 17, "end"), (17, 17, "end")]
)
def test_an_interval_outside_the_grant_is_refused(begin: int, end: int, field: str) -> None:
    grant = make_grant(end=16, blocks=[0, 1, 2, 3])

    with pytest.raises(InvalidInterval, match=rf"\[{begin}, {end}\).*\[0, 16\)") as caught:
        TransferPlan(make_layout(), make_layout(), grant, begin, end)

    assert caught.value.field == field


@pytest.mark.parametrize(
    ("begin", "end", "clamped"), [(0, 16, (8, 16)), (9, 16, (9, 16)), (0, 3, (3, 3)), (16, 16, (16, 16))]
)
def test_what_the_receiver_has_is_not_sent(begin: int, end: int, clamped: tuple[int, int]) -> None:
    plan = TransferPlan(
        make_layout(), make_layout(), make_grant(matched=8, end=16, blocks=[0, 1]), begin, end
    )

    assert (plan.begin, plan.end) == clamped


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"layout_hash": "x"}, TransferFailed),
        ({"block_size": 8}, TransferFailed),
        ({"blocks": [0, 1, 2]}, InvalidRequest),
        ({"blocks": [0, 1, 2, 3, 4]}, InvalidRequest),
        ({"blocks": [0, 1, 2, 8]}, InvalidRequest),
        ({"blocks": [0, 1, 2, -1]}, InvalidRequest),
        ({"blocks": [0, 1, 2, 1]}, InvalidRequest),
        ({"matched": 2}, InvalidRequest),
        ({"matched": 20}, InvalidRequest),
        ({"matched": -4}, InvalidRequest),
    ],
)
def test_a_grant_that_does_not_fit_is_refused(change: dict[str, object], error: type[MeshError]) -> None:
    grant = msgspec.structs.replace(make_grant(end=16, blocks=[0, 1, 2, 3]), **change)

    with pytest.raises(error):
        TransferPlan(make_layout(), make_layout(), grant, 0, 16)


def test_a_peer_with_another_layout_is_refused() -> None:
    with pytest.raises(TransferFailed, match="laid out"):
        TransferPlan(make_layout(), make_layout(model="x"), make_grant(end=4, blocks=[0]), 0, 4)


@pytest.mark.parametrize(
    ("blocks", "lo", "hi"),
    [([0, 1], 0, 16), ([0, 1, 2, 8], 0, 16), ([0, 1, 2, -1], 0, 16), ([0, 1, 2, 3], -1, 4)],
)
def test_a_wrong_source_table_is_our_own_fault(blocks: list[int], lo: int, hi: int) -> None:
    plan = TransferPlan(make_layout(), make_layout(), make_grant(end=16, blocks=[0, 1, 2, 3]), 0, 16)

    with pytest.raises(InternalError):
        plan.copies(blocks, lo, hi)


@settings(deadline=None, max_examples=examples(60))
@given(st.data())
def test_exactly_the_rows_of_the_interval_arrive(data: st.DataObject) -> None:
    """Any tables, any interval, any chunks, pools of different size; every other byte stays poisoned."""
    registry = MemoryRegistry()
    size = data.draw(st.integers(1, 5))
    mine = make_layout(num_blocks=data.draw(st.integers(6, 9)), block_size=size)
    theirs = make_layout(num_blocks=data.draw(st.integers(6, 9)), block_size=size)
    sender = MemoryHeap(mine, incarnation=SENDER, registry=registry)
    receiver = MemoryHeap(theirs, incarnation=RECEIVER, registry=registry)
    pool = BlockPool(theirs.num_blocks)
    table = GrantTable(
        *(receiver, pool), engine_id="e", incarnation=RECEIVER, lease_s=1.0, verify_checksums=True
    )
    num_matched = data.draw(st.integers(0, 3))
    matched = num_matched * size
    end = data.draw(st.integers(matched, 6 * size))
    stop = data.draw(st.integers(0, end))
    begin = data.draw(st.integers(0, stop))
    free = data.draw(st.permutations(pool.allocate(theirs.num_blocks)))
    num_new = theirs.num_blocks_for(end - matched)
    grant = table.open(
        "r", "o", free[:num_matched], matched, free[num_matched : num_matched + num_new], end, now=0.0
    )
    source_blocks = data.draw(st.permutations(range(mine.num_blocks)))[:6]
    fill(sender, source_blocks, 6 * size, seed=1)
    receiver.data[:] = POISON_BYTE
    expected = receiver.data.copy()
    for layer in range(theirs.num_layers):
        for kv in (K, V):
            for token in range(max(begin, matched), stop):
                block = grant.blocks[(token - matched) // size]
                start = theirs.offset(layer, block, kv, token % size)
                expected[start : start + theirs.row_nbytes] = bytearray(row(theirs, 1, layer, kv, token))
    cuts = sorted({0, stop, *data.draw(st.lists(st.integers(0, stop), max_size=3))})
    writer = LaneWriter(sender, sender.attach(receiver.address), grant, 1, begin, stop, checksums=True)
    writer.claim()

    nbytes = sum(
        writer.put_layer(layer, source_blocks, lo, hi)
        for lo, hi in itertools.pairwise(cuts)
        for layer in range(mine.num_layers)
    )
    writer.finish()

    assert np.array_equal(receiver.data, expected)
    assert nbytes == 2 * mine.num_layers * mine.row_nbytes * max(0, stop - max(begin, matched))
