"""KV whose every byte follows from (seed, layer, K or V, token), for tests that compare bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.layout import K, KvLayout, V, block_spans

POISON_BYTE = 0xEE


def make_layout(
    *, num_blocks: int = 8, num_layers: int = 2, block_size: int = 4, model: str = "tiny"
) -> KvLayout:
    return KvLayout(model, num_layers, num_blocks, block_size, 1, 4, "float16")


def row(layout: KvLayout, seed: int, layer: int, kv: int, token: int) -> bytes:
    return hashlib.shake_128(f"{seed}/{layer}/{kv}/{token}".encode()).digest(layout.row_nbytes)


def fill(heap: Heap, blocks: Sequence[int], num_tokens: int, seed: int) -> None:
    """Write the KV of tokens ``[0, num_tokens)`` as an engine that has computed it would."""
    for layer, kv, token, start in _rows(heap.layout, blocks, 0, 0, num_tokens):
        stop = start + heap.layout.row_nbytes
        heap.data[start:stop] = bytearray(row(heap.layout, seed, layer, kv, token))


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
    return [
        (layer, kv, token)
        for layer, kv, token, start in _rows(layout, blocks, origin, lo, hi)
        if (layers is None or layer in layers)
        and heap.data[start : start + layout.row_nbytes].tobytes() != row(layout, seed, layer, kv, token)
    ]


def paint(heap: Heap, blocks: Sequence[int], value: int) -> None:
    """Every byte of the blocks, in all layers."""
    _blocks_view(heap)[:, list(blocks)] = value


def is_painted(heap: Heap, blocks: Sequence[int], value: int) -> bool:
    return bool((_blocks_view(heap)[:, list(blocks)] == value).all())


def _blocks_view(heap: Heap) -> NDArray[np.uint8]:
    layout = heap.layout
    return heap.data.reshape(layout.num_layers, layout.num_blocks, layout.block_nbytes)


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
