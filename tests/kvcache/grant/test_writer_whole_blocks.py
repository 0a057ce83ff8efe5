"""Blocks whose inside is not ours: only whole ones are copied, and no bit of KV depends on how they came."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.grant.table import GrantTable
from microserve.kvcache.grant.writer import LaneWriter, TransferPlan
from microserve.kvcache.heap.local import MemoryHeap, MemoryRegistry
from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import InvalidInterval, TransferFailed
from microserve.protocol.messages.kv.grant import Grant, HeapAddress
from tests.support.kvcache.kv_samples import make_layout

SIZE = make_layout().block_size


def opaque(num_blocks: int) -> KvLayout:
    return msgspec.structs.replace(make_layout(num_blocks=num_blocks), order="somebody's")


def make_grant(end: int, matched: int = 0) -> Grant:
    layout = opaque(8)
    blocks = list(range(layout.num_blocks_for(end - matched)))
    return Grant(
        *("g", "engine", 2, 0, 1, matched, end, blocks, layout.block_size, layout.layout_hash),
        heap=HeapAddress("memory", "memory", 0, 0, 0, 2),
        lease_s=1.0,
    )


@pytest.mark.parametrize(
    ("begin", "end", "field"),
    [(1, 16, "begin"), (0, 5, "end"), (SIZE + 1, 15, "begin"), (0, 14, "end")],
)
def test_a_part_that_meets_another_one_inside_a_block_is_refused(begin: int, end: int, field: str) -> None:
    with pytest.raises(InvalidInterval, match=r"sent whole.*multiple of 4") as caught:
        TransferPlan(opaque(8), opaque(8), make_grant(15 if end != 16 else 16), begin, end)
    assert caught.value.field == field


@pytest.mark.parametrize(("begin", "end"), [(0, 15), (4, 15), (0, 12), (8, 8), (15, 15)])
def test_parts_that_meet_at_blocks_are_fine(begin: int, end: int) -> None:
    plan = TransferPlan(opaque(8), opaque(8), make_grant(15), begin, end)
    assert (plan.begin, plan.end) == (begin, end)


def test_rows_and_whole_blocks_do_not_meet() -> None:
    with pytest.raises(TransferFailed, match="laid out"):
        TransferPlan(opaque(8), make_layout(num_blocks=8), make_grant(8), 0, 8)


@given(st.data())
def test_whatever_the_chunks_all_blocks_arrive_whole_with_tags_and_checksums(data: st.DataObject) -> None:
    matched = data.draw(st.integers(0, 3)) * SIZE
    end = data.draw(st.integers(matched + 1, 8 * SIZE))
    cuts = sorted(data.draw(st.sets(st.integers(1, end), max_size=5)) | {end})
    split = data.draw(st.sampled_from([end, *range(matched, end, SIZE)]))

    registry = MemoryRegistry()
    with (
        MemoryHeap(opaque(12), incarnation=1, registry=registry) as sender,
        MemoryHeap(opaque(8), incarnation=2, registry=registry) as receiver,
        sender.attach(receiver.address) as peer,
    ):
        sender.data[:] = np.random.default_rng(1).integers(0, 256, sender.data.size, np.uint8)
        source = random.Random(end).sample(range(12), sender.layout.num_blocks_for(end))
        pool = BlockPool(8)
        table = GrantTable(
            *(receiver, pool), engine_id="e", incarnation=2, lease_s=1.0, verify_checksums=True
        )
        matched_blocks = pool.allocate(matched // SIZE)
        taken = pool.allocate(receiver.layout.num_blocks_for(end - matched))
        grant = table.open("r", "router", matched_blocks, matched, taken, end, now=0.0)

        for lane, (begin, stop) in enumerate([(0, split), (split, end)]):
            writer = LaneWriter(sender, peer, grant, lane, begin, stop, checksums=True)
            writer.claim()
            lo = nbytes = 0
            for hi in cuts:
                for layer in range(sender.layout.num_layers):
                    nbytes += writer.put_layer(layer, source[: sender.layout.num_blocks_for(hi)], lo, hi)
                lo = hi
            writer.finish()
            num_blocks = sender.layout.num_blocks_for(stop) - sender.layout.num_blocks_for(
                max(begin, matched)
            )
            assert nbytes == max(0, num_blocks) * sender.layout.block_nbytes * sender.layout.num_layers

        assert table.is_complete(grant.grant_id)
        layout = sender.layout
        for layer in range(layout.num_layers):
            table.verify(grant.grant_id, layer)
            for mine, theirs in zip(source[matched // SIZE :], grant.blocks, strict=True):
                start = layer * layout.layer_nbytes + mine * layout.block_nbytes
                there = layer * receiver.layout.layer_nbytes + theirs * layout.block_nbytes
                assert np.array_equal(
                    sender.read_data(start, layout.block_nbytes),
                    receiver.read_data(there, layout.block_nbytes),
                )
