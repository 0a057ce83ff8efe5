"""Symbols as so many bits as their head's levels need, the lowest bit first; each head begins at a byte."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from microserve.kvcache.codec.frame import Bytes, Reader


def bits_for(levels: int) -> int:
    return (levels - 1).bit_length()


def packed_nbytes(count: int, levels: int) -> int:
    return -(-count * bits_for(levels) // 8)


def pack(symbols: Bytes, levels: Sequence[int]) -> list[Bytes]:
    """symbols: [heads, elements]."""
    made = []
    for head, count in zip(symbols, levels, strict=True):
        bits = np.unpackbits(head[:, None], axis=1, count=bits_for(count), bitorder="little")
        made.append(np.packbits(bits.reshape(-1), bitorder="little"))
    return made


def unpack(reader: Reader, levels: Sequence[int], count: int) -> Bytes:
    """[heads, ``count``]. Raises :class:`CodecFailed` where there are too few bytes."""
    made = np.empty((len(levels), count), np.uint8)
    for head, each in zip(made, levels, strict=True):
        packed = reader.take(packed_nbytes(count, each), "packed symbols")
        bits = np.unpackbits(packed, count=count * bits_for(each), bitorder="little")
        head[:] = np.packbits(bits.reshape(count, -1), axis=1, bitorder="little")[:, 0]
    return made
