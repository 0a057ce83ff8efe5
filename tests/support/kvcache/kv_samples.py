"""KV whose every byte follows from (seed, layer, K or V, token), for tests that compare bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from microserve.kvcache.heap.heap import Heap, PeerHeap
from microserve.kvcache.layout import K, KvLayout, V, block_spans

POISON_BYTE = 0xEE


def make_layout(
    *, num_blocks: int = 8, num_layers: int = 2, block_size: int = 4, model: str = "tiny"
) -> KvLayout:
    return KvLayout(model, num_layers, num_blocks, block_size, 1, 4, "float16")


def row(layout: KvLayout, seed: int, layer: int, kv: int, token: int) -> bytes:
    return hashlib.shake_128(f"{seed}/{layer}/{kv}/{token}".encode()).digest(layout.row_nbytes)


def data_of(heap: Heap) -> NDArray[np.uint8]:
    """All of the data region; a copy."""
    return heap.read_data(0, heap.layout.data_nbytes).copy()


def set_data(heap: Heap, content: int | bytes) -> None:
    """Every byte of the data region."""
    if isinstance(content, int):
        content = bytes([content]) * heap.layout.data_nbytes
    heap.write_data(0, np.frombuffer(content, np.uint8))


def settle(peer: PeerHeap, heap: Heap) -> None:
    """Wait until the owner sees all that was put, signalled and let go."""
    peer.poll(wait=True)
    heap.poll(wait=True)


def fill(heap: Heap, blocks: Sequence[int], num_tokens: int, seed: int) -> None:
    """Write the KV of tokens ``[0, num_tokens)`` as an engine that has computed it would."""
    for layer, kv, token, start in _rows(heap.layout, blocks, 0, 0, num_tokens):
        heap.write_data(start, np.frombuffer(row(heap.layout, seed, layer, kv, token), np.uint8))


def mismatches(
    heap: Heap,
    blocks: Sequence[int],
    origin: int,
    lo: int,
    hi: int,
    seed: int,
    layers: Sequence[int] | None = None,
) -> list[tuple[int, int, int]]:
    """``(layer, kv, token)`` of ``[lo, hi)`` whose row differs; ``blocks[0]`` starts at ``origin``."""
    layout = heap.layout
    data = heap.read_data(0, layout.data_nbytes)
    return [
        (layer, kv, token)
        for layer, kv, token, start in _rows(layout, blocks, origin, lo, hi)
        if (layers is None or layer in layers)
        and data[start : start + layout.row_nbytes].tobytes() != row(layout, seed, layer, kv, token)
    ]


def paint(heap: Heap, blocks: Sequence[int], value: int) -> None:
    """Every byte of the blocks, in all layers."""
    layout = heap.layout
    for layer in range(layout.num_layers):
        for block in blocks:
            start = layout.offset(layer, block, K, 0)
            heap.write_data(start, np.full(layout.block_nbytes, value, np.uint8))


def is_painted(heap: Heap, blocks: Sequence[int], value: int) -> bool:
    return bool((_blocks_view(heap)[:, list(blocks)] == value).all())


def _blocks_view(heap: Heap) -> NDArray[np.uint8]:
    layout = heap.layout
    return heap.read_data(0, layout.data_nbytes).reshape(
        layout.num_layers, layout.num_blocks, layout.block_nbytes
    )


def _rows(
    layout: KvLayout, blocks: Sequence[int], origin: int, lo: int, hi: int
) -> list[tuple[int, int, int, int]]:
    rows = []
    token = lo
    for block, first, num_rows in block_spans(blocks, origin, lo, hi, layout.block_size):
        for index in range(num_rows):
            rows += [
                (layer, kv, token, layout.offset(layer, block, kv, first + index))
                for layer in range(layout.num_layers)
                for kv in (K, V)
            ]
            token += 1
    return rows
