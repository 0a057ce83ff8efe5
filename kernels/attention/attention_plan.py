"""The shape of one step's attention: what is gathered, what is padded, what each token may see.

Owns index tensors and masks, built once per step and used by every layer. Must not know how they are
executed (``paged_attention.py``), nor models, schedulers or who owns the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_Indices = npt.NDArray[np.int64]

GROUP_NBYTES = 4 << 20
"""Gathered K and V of one group of decoding sequences: above it, the copy falls out of the cache."""
PADDING_NBYTES = 256 << 10
"""Padding that costs as much time as the extra calls of one more group."""
TILE_ROW_NBYTES = 128
"""Query tokens of a prefill tile times the element size: 32 in fp32, 64 in bf16. A smaller tile wastes less
work above the causal diagonal, a larger one feeds the matrix units better."""


class Span(NamedTuple):
    """One sequence's share of a step."""

    query_len: int
    """New tokens, at least 1."""
    context_len: int
    """Tokens in the cache once the new ones are written."""
    block_table: Sequence[int]
    """Blocks of tokens [0, context_len) in order; may be longer than needed."""


@dataclass(frozen=True, slots=True)
class Gather:
    """Which half blocks to copy, and which of the copied rows count: [first, first + length) of each."""

    num_sequences: int
    halves: Tensor
    """[2 * num_sequences * blocks] int64: every sequence's K halves, then every sequence's V halves. Half
    ``2 * b`` is block b's keys and ``2 * b + 1`` its values."""
    first: int
    length: int
    garbage: Tensor | None
    """Copied rows past a sequence's end, to be zeroed: a stray NaN survives a weight of 0."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with one new token each and contexts of about the same length."""

    gather: Gather
    tokens: Tensor | None
    """[num_sequences] int64 rows of the packed query; None: all of them in order."""
    mask: Tensor | None
    """[num_sequences * num_kv_heads, 1, length], 0 or -inf; None: every row is seen."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Query tokens [query_begin, query_end) of a chunk against gathered rows [key_begin, key_end)."""

    query_begin: int
    query_end: int
    key_begin: int
    key_end: int
    mask: Tensor
    """[query tokens, 1, n]: 0 or -inf for the last n of those rows; all before them are seen."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence with several new tokens: rows [begin, begin + query_len) of the packed query."""

    gather: Gather
    begin: int
    query_len: int
    tiles: list[Tile]


class Layout(NamedTuple):
    groups: list[DecodeGroup]
    chunks: list[Chunk]


class _Seen(NamedTuple):
    """What one sequence's new tokens can see, in rows counted from the first block that they see."""

    token: int
    """Row of its first new token in the packed query."""
    begin: int
    end: int
    table: _Indices
    """Blocks from the first that is seen."""

    @property
    def num_rows(self) -> int:
        return self.end - self.begin


class AttentionPlan:
    """The work of one step.

    sequences: in the order of their tokens in the packed query; kv: any layer of the pool (for its geometry,
    dtype and device). ``num_tokens`` is the packed query's rows. Raises ``ValueError`` for a span that
    does not fit its block table or the pool.
    """

    def __init__(self, sequences: Sequence[Span], kv: Tensor) -> None:
        self._num_blocks, _, self._block_size, self._num_kv_heads, head_dim = kv.shape
        self._row_nbytes = 2 * self._num_kv_heads * head_dim * kv.element_size()
        self._dtype, self._device = kv.dtype, kv.device
        self._sequences = [(span.query_len, span.context_len, self._table(span)) for span in sequences]
        self.num_tokens = sum(span.query_len for span in sequences)
        self._max_context_len = max((span.context_len for span in sequences), default=0)
        self._layouts: dict[int | None, Layout] = {}

    def layout(self, sliding_window: int | None) -> Layout:
        """The work of layers with that window; built at its first use."""
        window = sliding_window
        if window is not None and window >= self._max_context_len:
            window = None
        if window not in self._layouts:
            decoding, chunks = [], []
            token = 0
            for query_len, context_len, table in self._sequences:
                start = _first_seen(context_len - query_len, window)
                skipped = start // self._block_size
                offset = skipped * self._block_size
                seen = _Seen(token, start - offset, context_len - offset, table[skipped:])
                if query_len == 1:
                    decoding.append(seen)
                else:
                    chunks.append(self._chunk(seen, query_len, window))
                token += query_len
            groups = [self._decode_group(members) for members in self._grouped(decoding)]
            self._layouts[window] = Layout(groups, chunks)
        return self._layouts[window]

    def _table(self, span: Span) -> _Indices:
        """The blocks that the span's context needs."""
        needed = -(-span.context_len // self._block_size)
        table = np.asarray(span.block_table[:needed], dtype=np.int64)
        if not 1 <= span.query_len <= span.context_len:
            raise ValueError(
                f"query_len {span.query_len} must be between 1 and context_len {span.context_len}"
            )
        if len(table) < needed:
            raise ValueError(f"block_table has {len(table)} blocks, {span.context_len} tokens need {needed}")
        if table.min() < 0 or table.max() >= self._num_blocks:
            raise ValueError(f"block_table names a block outside [0, {self._num_blocks})")
        return table

    def _grouped(self, decoding: list[_Seen]) -> list[list[_Seen]]:
        """Each group takes the next longer sequence while the padding costs less than one more group."""
        groups: list[list[_Seen]] = []
        padding = 0
        for seen in sorted(decoding, key=lambda seen: seen.num_rows):
            if groups:
                group = groups[-1]
                padding += len(group) * (seen.num_rows - group[-1].num_rows)
                fits = (len(group) + 1) * seen.num_rows * self._row_nbytes <= GROUP_NBYTES
                if fits and padding * self._row_nbytes <= PADDING_NBYTES:
                    group.append(seen)
                    continue
            groups.append([seen])
            padding = 0
        return [sorted(group, key=lambda seen: seen.token) for group in groups]

    def _decode_group(self, members: list[_Seen]) -> DecodeGroup:
        begins = np.array([seen.begin for seen in members])[:, None]
        ends = np.array([seen.end for seen in members])[:, None]
        rows = np.arange(begins.min(), ends.max())
        hidden = (rows < begins) | (rows >= ends)
        mask = None
        if hidden.any():
            mask = self._bias(hidden).repeat_interleave(self._num_kv_heads, 0).unsqueeze(1)
        tokens = None
        if len(members) < self.num_tokens:
            tokens = self._index(np.array([seen.token for seen in members]))
        return DecodeGroup(self._gather(members), tokens, mask)

    def _chunk(self, seen: _Seen, query_len: int, window: int | None) -> Chunk:
        # All below in gathered rows: row r is r rows after the first one that any new token sees.
        start = seen.num_rows - query_len
        step = max(1, TILE_ROW_NBYTES // self._dtype.itemsize)
        tiles = []
        for query_begin in range(0, query_len, step):
            query_end = min(query_begin + step, query_len)
            first, last = start + query_begin, start + query_end
            queries = np.arange(first, last)[:, None]
            key_begin = _first_seen(first, window)
            # Without a window every row before the tile's own is seen and needs no mask.
            keys = np.arange(first if window is None else key_begin, last)
            hidden = keys > queries
            if window is not None:
                hidden |= keys <= queries - window
            tiles.append(Tile(query_begin, query_end, key_begin, last, self._bias(hidden).unsqueeze(1)))
        return Chunk(self._gather([seen]), seen.token, query_len, tiles)

    def _gather(self, members: list[_Seen]) -> Gather:
        first = min(seen.begin for seen in members)
        end = max(seen.end for seen in members)
        blocks = np.empty((len(members), -(-end // self._block_size)), dtype=np.int64)
        for row, seen in zip(blocks, members, strict=True):
            row[: len(seen.table)] = seen.table
            row[len(seen.table) :] = seen.table[0]  # padding: any block will do, its rows are zeroed
        halves = np.concatenate([blocks.reshape(-1) * 2, blocks.reshape(-1) * 2 + 1])
        ends = np.array([seen.end for seen in members])[:, None]
        stray = np.arange(blocks.shape[1] * self._block_size) >= ends
        stray[:, end:] = False  # copied, but past what counts
        garbage = np.flatnonzero(np.stack([stray, stray]))
        return Gather(
            num_sequences=len(members),
            halves=self._index(halves),
            first=first,
            length=end - first,
            garbage=self._index(garbage) if len(garbage) else None,
        )

    def _index(self, values: _Indices) -> Tensor:
        return torch.from_numpy(values).to(self._device)

    def _bias(self, hidden: npt.NDArray[np.bool_]) -> Tensor:
        bias = torch.zeros(hidden.shape, dtype=self._dtype)
        return bias.masked_fill_(torch.from_numpy(hidden), float("-inf")).to(self._device)


def _first_seen(position: int, window: int | None) -> int:
    return 0 if window is None else max(0, position - window + 1)
