"""A running checksum over the KV of consecutive tokens: equal for the sender's rows and the receiver's."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.layout import K, V


def extend_checksum(
    checksum: int,
    heap: Heap,
    layer: int,
    spans: Iterable[tuple[int, int, int]],
) -> int:
    """``checksum`` (0 at first) carried on over more rows of one layer: crc32 of K << 32 | crc32 of V.

    ``spans`` are ``(block, first row, number of rows)`` in token order, as ``block_spans`` gives them. Where
    blocks have no rows, all of a block counts as its K.
    """
    layout = heap.layout
    keys, values = checksum >> 32, checksum & 0xFFFFFFFF
    for block, row, num_rows in spans:
        if not layout.has_rows:
            start = layout.offset(layer, block, K, 0)
            keys = zlib.crc32(heap.read_data(start, layout.block_nbytes).data, keys)
            continue
        start = layout.offset(layer, block, K, row)
        keys = zlib.crc32(heap.read_data(start, num_rows * layout.row_nbytes).data, keys)
        start = layout.offset(layer, block, V, row)
        values = zlib.crc32(heap.read_data(start, num_rows * layout.row_nbytes).data, values)
    return keys << 32 | values


def extend_by_payload(checksum: int, payload: NDArray[np.uint8]) -> int:
    """Likewise over a codec's payload, which counts as K."""
    return zlib.crc32(payload.data, checksum >> 32) << 32 | checksum & 0xFFFFFFFF
