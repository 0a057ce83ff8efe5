"""The hash model with rows that say which numerics classes they come from.

Tokens are the same in every class. What differs is one byte of each K row, the *mark*: a bit for the class
that computed it, and those of all rows that it was made from. Nothing that is hashed sees it; it goes where
the row goes, through caches, puts and failovers, so that a sampled token tells which classes it owes to,
whatever the services believe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from microserve.kvcache.layout import KvLayout
from microserve.protocol.messages.numerics import Numerics
from microserve.services.engine.core.batch import Chunk, Sampled
from microserve.services.simulation.engine.hash_runner import HASH, ROW_NBYTES, HashRunner, _digest

OnSampled = Callable[[Chunk, int], None]
"""Told a chunk that is sampled from, and the mark of its token."""


class MarkedRunner(HashRunner):
    """A hidden state is its hash, and behind it one byte: its mark. An embedding has none yet."""

    def __init__(
        self,
        data: npt.NDArray[np.uint8],
        layout: KvLayout,
        *,
        vocab_size: int,
        numerics: Numerics,
        mark: int,
        on_sampled: OnSampled,
    ) -> None:
        """``mark``: the bit of this engine's class."""
        super().__init__(data, layout, vocab_size=vocab_size, numerics=numerics)
        self._mark = mark
        self._on_sampled = on_sampled

    def marks_of(self, block: int) -> int:
        """Of all K rows of one block, every layer."""
        marks = 0
        for layer in range(self._layout.num_layers):
            start = layer * self._layer_nbytes + block * self._block_nbytes
            marks |= _marks(self._kv[start : start + self._half_nbytes])
        return marks

    def _write(self, layer: int, chunk: Chunk, state: list[bytes]) -> None:
        super()._write(layer, chunk, [hidden[:ROW_NBYTES] for hidden in state])
        size, base = self._layout.block_size, layer * self._layer_nbytes
        for position, hidden in enumerate(state, start=chunk.start):
            if position >= chunk.write_from:
                block = base + chunk.block_table[position // size] * self._block_nbytes
                self._kv[block + position % size * ROW_NBYTES] = self._mark | _mark_of(hidden)

    def _attend(self, layer: int, chunk: Chunk, state: list[bytes]) -> list[bytes]:
        """As the plain runner's, of the same bytes but for the marks, which add up."""
        size, base, half = self._layout.block_size, layer * self._layer_nbytes, self._half_nbytes
        starts = [base + block * self._block_nbytes for block in chunk.block_table]
        before, marks, out = hashlib.blake2b(digest_size=ROW_NBYTES), self._mark, []
        for start in starts[: chunk.start // size]:
            before.update(self._unmarked(start, half))
            before.update(self._kv[start + half : start + 2 * half])
            marks |= _marks(self._kv[start : start + half])
        for position, hidden in enumerate(state, start=chunk.start):
            start, nbytes = starts[position // size], (position % size + 1) * ROW_NBYTES
            seen = before.copy()
            seen.update(self._unmarked(start, nbytes))
            seen.update(self._kv[start + half : start + half + nbytes])
            mark = marks | _marks(self._kv[start : start + nbytes]) | _mark_of(hidden)
            out.append(_digest(hidden[:ROW_NBYTES], seen.digest()) + bytes((mark,)))
            if nbytes == half:
                before.update(self._unmarked(start, half))
                before.update(self._kv[start + half : start + 2 * half])
                marks |= _marks(self._kv[start : start + half])
        return out

    def _sample(self, chunk: Chunk, hidden: bytes) -> Sampled | None:
        if chunk.sample is not None:
            self._on_sampled(chunk, _mark_of(hidden))
        return super()._sample(chunk, hidden[:ROW_NBYTES])

    def _unmarked(self, start: int, nbytes: int) -> bytes:
        rows = bytearray(self._kv[start : start + nbytes])
        rows[::ROW_NBYTES] = bytes(nbytes // ROW_NBYTES)
        return bytes(rows)


def _marks(rows: memoryview) -> int:
    marks = 0
    for mark in rows[::ROW_NBYTES]:
        marks |= mark
    return marks


def _mark_of(hidden: bytes) -> int:
    return hidden[ROW_NBYTES] if len(hidden) > ROW_NBYTES else 0


def marked(data: npt.NDArray[np.uint8], layout: KvLayout, vocab_size: int) -> HashRunner:
    """For the oracle: what any class computes."""
    return MarkedRunner(
        data, layout, vocab_size=vocab_size, numerics=HASH, mark=1, on_sampled=lambda chunk, mark: None
    )
