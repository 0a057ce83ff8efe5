"""Log-probabilities of a prompt's own tokens, as they travel: rows of numbers, as bytes (WIRE.md 4.3).

    row of position p     logprob f32 | rank u32 | num_top times (token id u32 | logprob f32)

Position 0 has none, for nothing stands before it. A long prompt has many rows of many numbers, and nobody on
their way looks into them: as bytes they are cut, joined and handed on at no cost.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

FIRST_POSITION = 1
"""The first prompt token that something stands before."""


class PromptLogprob(NamedTuple):
    """Of one prompt token behind those before it, from the raw logits."""

    logprob: float
    rank: int
    """1: no token is likelier."""
    top: tuple[tuple[int, float], ...]
    """Token id and log-probability of the likeliest, likeliest first."""


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Of the prompt tokens at positions ``[begin, end)``."""

    begin: int
    num_top: int
    """Of the likeliest tokens in each row."""
    rows: bytes

    @property
    def end(self) -> int:
        return self.begin + len(self)

    def __len__(self) -> int:
        return len(self.rows) // row_nbytes(self.num_top)

    def __iter__(self) -> Iterator[PromptLogprob]:
        layout = struct.Struct("<fI" + "If" * self.num_top)
        for logprob, rank, *top in layout.iter_unpack(self.rows):
            yield PromptLogprob(logprob, rank, tuple(zip(top[::2], top[1::2], strict=True)))

    @property
    def is_whole(self) -> bool:
        """It can be what it says: its rows are whole ones, and of positions that have any."""
        return (
            self.begin >= FIRST_POSITION
            and self.num_top >= 0
            and len(self.rows) % row_nbytes(self.num_top) == 0
        )

    def behind(self, position: int) -> PromptLogprobs:
        """Without the rows of positions below ``position``."""
        if position <= self.begin:
            return self
        skipped = min(position, self.end) - self.begin
        rows = self.rows[skipped * row_nbytes(self.num_top) :]
        return PromptLogprobs(self.begin + skipped, self.num_top, rows)

    def until(self, position: int) -> PromptLogprobs:
        """Without the rows of ``position`` and behind it."""
        kept = max(0, min(position, self.end) - self.begin)
        return PromptLogprobs(self.begin, self.num_top, self.rows[: kept * row_nbytes(self.num_top)])

    def joined(self, later: PromptLogprobs) -> PromptLogprobs:
        """With those that follow. ``ValueError`` for others."""
        if later.begin != self.end or later.num_top != self.num_top:
            raise ValueError(f"rows from {later.begin} do not follow those up to {self.end}")
        return PromptLogprobs(self.begin, self.num_top, self.rows + later.rows)


def row_nbytes(num_top: int) -> int:
    return 8 * (1 + num_top)


def packed(begin: int, num_top: int, rows: Sequence[PromptLogprob]) -> PromptLogprobs:
    """``rows``: each with ``num_top`` of the likeliest tokens."""
    layout = struct.Struct("<fI" + "If" * num_top)
    data = [layout.pack(row.logprob, row.rank, *(each for pair in row.top for each in pair)) for row in rows]
    return PromptLogprobs(begin, num_top, b"".join(data))
