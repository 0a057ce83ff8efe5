"""Where a codec's payload lies in the blocks of a grant, and how rows get out of blocks and into them.

A payload of tokens ``[lo, hi)`` of one layer, where ``lo`` begins a block, lies front to back in the bytes
that these tokens' rows are to take, block after block, K before V; nowhere else. So whoever writes the rows
behind ``hi`` in the last block is not in its way.

Arithmetic and copies only. Does not know what a payload is (kvcache/codec), nor when one is there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from microserve.kvcache.heap.heap import Copies, Copy
from microserve.kvcache.layout import KvLayout, block_spans

Bytes = NDArray[np.uint8]
Span = tuple[int, int]
"""First byte in a layer, number of bytes."""


def payload_spans(layout: KvLayout, blocks: Sequence[int], num_tokens: int) -> list[Span]:
    """The bytes of the rows of ``num_tokens`` tokens, from the first one in ``blocks[0]`` on."""
    spans: list[Span] = []
    for block, _, num_rows in block_spans(blocks, 0, 0, num_tokens, layout.block_size):
        start = block * layout.block_nbytes
        if num_rows == layout.block_size:
            spans.append((start, layout.block_nbytes))
        else:
            spans += ((start + half, num_rows * layout.row_nbytes) for half in (0, layout.half_nbytes))
    return spans


def payload_copies(spans: Sequence[Span], nbytes: int) -> Copies:
    """A payload of so many bytes, front to back, into ``spans`` of layer 0; the rest of them stays as it
    is."""
    copies: list[Copy] = []
    done = 0
    for start, size in spans:
        if done == nbytes:
            break
        count = min(size, nbytes - done)
        copies.append(Copy(done, start, count))
        done += count
    return Copies(copies)


class LayerRows:
    """Rows of a heap whose data region is memory of this process. Any thread."""

    def __init__(self, layout: KvLayout, data: Bytes) -> None:
        """``data``: the data region; ``layout`` has rows."""
        self._layout = layout
        self._data = data.reshape(layout.num_layers, -1)
        shape = layout.num_layers, layout.num_blocks, 2, layout.block_size, layout.row_nbytes
        self._rows = data.reshape(shape)

    def payload(self, layer: int, spans: Sequence[Span], nbytes: int) -> Bytes:
        """A copy of the first ``nbytes`` bytes of ``spans``."""
        payload = np.empty(nbytes, np.uint8)
        done = 0
        for start, size in spans:
            if done == nbytes:
                break
            count = min(size, nbytes - done)
            payload[done : done + count] = self._data[layer, start : start + count]
            done += count
        return payload

    def gather(self, layer: int, blocks: Sequence[int], num_tokens: int) -> tuple[Bytes, Bytes]:
        """K and V of ``num_tokens`` tokens from the first one in ``blocks[0]`` on: copies, each of shape
        ``[num_tokens, row_nbytes]``."""
        some = self._rows[layer, np.asarray(blocks, np.int64)]
        keys, values = (some[:, half].reshape(-1, self._layout.row_nbytes) for half in (0, 1))
        return keys[:num_tokens], values[:num_tokens]

    def scatter(self, layer: int, blocks: Sequence[int], keys: Bytes, values: Bytes) -> None:
        """The other way; rows behind the last one stay as they are."""
        num_whole, rest = divmod(len(keys), self._layout.block_size)
        whole = np.asarray(blocks[:num_whole], np.int64)
        for half, rows in enumerate((keys, values)):
            target = self._rows[layer, :, half]
            end = len(rows) - rest
            target[whole] = rows[:end].reshape(num_whole, self._layout.block_size, rows.shape[1])
            if rest:
                target[blocks[num_whole], :rest] = rows[end:]
