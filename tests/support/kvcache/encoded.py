"""KV that a codec makes smaller, and writers that put it as payloads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.codec.codec import SUPPORTED, Codec
from microserve.kvcache.codec.profile import Levels, Profile
from microserve.kvcache.grant.decoding import LaneDecoder
from microserve.kvcache.grant.payload import LayerRows
from microserve.kvcache.grant.table import GrantTable
from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.heap.heap import PeerHeap
from microserve.kvcache.heap.local import MemoryHeap, MemoryRegistry
from microserve.kvcache.heap.mapped import MappedHeap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.messages.kv.coding import Decoding
from microserve.protocol.messages.kv.grant import Grant

LOSSLESS = Profile("lossless-zstd", coder="zstd")
LOSSY = Profile("u12-pack", quantiser="uniform", keys=Levels(12), values=Levels(12), coder="pack")
LAYOUT = KvLayout("tiny", 2, 12, 4, 2, 16, "bfloat16")
"""Blocks of 4 tokens with 512 bytes in each of 2 layers."""
WIDE = KvLayout("wide", 4, 32, 16, 4, 64, "bfloat16")
"""Of 1 KiB for a token and layer, as small models have it."""


def rows_of(layout: KvLayout, num_tokens: int, seed: int) -> NDArray[np.uint8]:
    """Rows ``[layer][K | V][token][byte]`` of numbers as KV has them."""
    shape = layout.num_layers, 2, num_tokens, layout.row_nbytes // 2
    numbers = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def write_rows(heap: MappedHeap, blocks: Sequence[int], rows: NDArray[np.uint8]) -> None:
    view = LayerRows(heap.layout, heap.data)
    for layer, (keys, values) in enumerate(rows):
        view.scatter(layer, blocks, keys, values)


def read_rows(heap: MappedHeap, blocks: Sequence[int], num_tokens: int) -> NDArray[np.uint8]:
    view = LayerRows(heap.layout, heap.data)
    return np.stack(
        [np.stack(view.gather(each, blocks, num_tokens)) for each in range(heap.layout.num_layers)]
    )


def codec_of(profile: Profile, layout: KvLayout) -> Codec:
    shape = layout.num_layers, layout.num_kv_heads
    scores = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    is_by_head = profile.quantiser == "mixed_head"
    return Codec(profile, layout.geometry, head_scores=scores if is_by_head else None)


class ByHand:
    """A ``Decoder`` that works when it is told to."""

    def __init__(self) -> None:
        self.terms = Decoding(list(SUPPORTED))
        self.lanes: list[LaneDecoder] = []

    def add(self, lane: LaneDecoder) -> None:
        self.lanes.append(lane)

    def work(self) -> None:
        for lane in self.lanes:
            while lane.advance():
                pass


class EncodedWorld:
    """A receiver that decodes, and senders that have ``rows``."""

    def __init__(self, layout: KvLayout = LAYOUT) -> None:
        self.registry = MemoryRegistry()
        self.heap = MemoryHeap(layout, incarnation=1, registry=self.registry, num_slots=3)
        self.pool = BlockPool(layout.num_blocks)
        self.decoder = ByHand()
        self.table = GrantTable(
            *(self.heap, self.pool),
            engine_id="e",
            incarnation=1,
            lease_s=5.0,
            verify_checksums=True,
            decoder=self.decoder,
        )
        self.num_senders = 1

    def open(self, *, end: int = 16, matched: int = 0, may_lose: bool = False) -> Grant:
        size = self.heap.layout.block_size
        matched_blocks = self.pool.allocate(matched // size)
        blocks = self.pool.allocate(self.heap.layout.num_blocks_for(end - matched))
        return self.table.open("r", "o", matched_blocks, matched, blocks, end, 0.0, may_lose=may_lose)

    def sender(self, rows: NDArray[np.uint8]) -> MemoryHeap:
        """A new process that has the KV in its blocks 0, 1, 2, ..."""
        self.num_senders += 1
        layout = self.heap.layout
        heap = MemoryHeap(layout, incarnation=self.num_senders, registry=self.registry, num_slots=1)
        write_rows(heap, range(layout.num_blocks_for(rows.shape[2])), rows)
        return heap

    def writer(
        self,
        grant: Grant,
        rows: NDArray[np.uint8],
        *,
        lane: int = 0,
        begin: int = 0,
        end: int | None = None,
        encoded: bool = True,
        peer: PeerHeap | None = None,
    ) -> LaneWriter:
        heap = self.sender(rows)
        bounds = lane, begin, grant.end if end is None else end
        peer = peer or heap.attach(grant.heap)
        return LaneWriter(heap, peer, grant, *bounds, checksums=True, encoded=encoded)

    def payload(
        self, layer: int, rows: NDArray[np.uint8], lo: int, hi: int, profile: Profile = LOSSLESS
    ) -> NDArray[np.uint8]:
        keys, values = (np.ascontiguousarray(half[lo:hi]) for half in rows[layer])
        out = np.empty(keys.nbytes + values.nbytes - 1, np.uint8)
        nbytes = codec_of(profile, self.heap.layout).encode(layer, keys, values, out)
        assert nbytes is not None, "it is not smaller"
        return out[:nbytes]

    def send(self, grant: Grant, rows: NDArray[np.uint8], profile: Profile = LOSSLESS) -> LaneWriter:
        """Claim, and put every layer in one payload."""
        writer = self.writer(grant, rows)
        writer.claim()
        for layer in range(self.heap.layout.num_layers):
            payload = self.payload(layer, rows, grant.matched, grant.end, profile)
            writer.put_payload(layer, payload, grant.matched, grant.end)
        return writer

    def check(self) -> None:
        self.table.check_integrity()
        self.pool.check_integrity()
