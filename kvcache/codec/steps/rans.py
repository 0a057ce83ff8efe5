"""An entropy coder for symbols: range asymmetric numeral systems (Duda), sixteen states that take turns.

A stream of groups of equally many symbols (a head each), each group with a table of its own:

    tables   for each group: a bit for each level that occurs (lowest bit first), then of each of those, u16,
             how many of 4096 are its
    states   16 u32, as the decoder begins
    words    u16, in the order in which the decoder takes them

Symbol i of a group is state i % 16's. A state lies in [2^16, 2^32); what is too large for a symbol gives its
lower 16 bits away first, and what has become too small takes as many back. Encoded back to front, from states
of 2^16, to which the decoder must come back: that, and that all words are used, is checked.

Owns this form in numpy; ``kernels/codec/`` has the same bytes from C++. Must not know what symbols are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from microserve.kvcache.codec.frame import Bytes, CodecFailed, Reader

LANES = 16
BITS = 12
TOTAL = 1 << BITS
LEAST = 1 << 16

Frequencies = npt.NDArray[np.int64]


def frequencies(symbols: Bytes, levels: int) -> Frequencies:
    """Of 4096, at least 1 for each symbol that occurs: shares rounded down, and what is left is the most
    frequent one's (the first of several), or what is too much taken from it, half of it at most at a time."""
    counts = np.bincount(symbols, minlength=levels).astype(np.int64)
    shares = np.where(counts > 0, np.maximum(counts * TOTAL // symbols.size, 1), 0)
    while (over := int(shares.sum()) - TOTAL) != 0:
        most = int(shares.argmax())
        shares[most] -= min(over, int(shares[most]) // 2)
    return shares


def encode(symbols: Bytes, levels: Sequence[int]) -> Bytes:
    """symbols: [groups, elements]; ``levels``: of each group."""
    tables = [frequencies(group, count) for group, count in zip(symbols, levels, strict=True)]
    states = np.full(LANES, LEAST, np.uint64)
    words: list[npt.NDArray[np.uint16]] = []
    for group, table in zip(symbols[::-1], tables[::-1], strict=True):
        starts = np.cumsum(table) - table
        share, start = table[group].astype(np.uint64), starts[group].astype(np.uint64)
        for begin in reversed(range(0, group.size, LANES)):
            f, c = share[begin : begin + LANES], start[begin : begin + LANES]
            x = states[: f.size]
            is_large = x >= f << np.uint64(32 - BITS)
            if is_large.any():
                words.append(x[is_large].astype(np.uint16))
                x = np.where(is_large, x >> np.uint64(16), x)
            states[: f.size] = (x // f << np.uint64(BITS)) + x % f + c
    parts = [_table_bytes(table) for table in tables]
    parts.append(states.astype("<u4").view(np.uint8))
    parts += [each.astype("<u2").view(np.uint8) for each in words[::-1]]
    return np.concatenate(parts)


def decode(stream: Bytes, levels: Sequence[int], count: int) -> Bytes:
    """[groups, ``count``]. Raises :class:`CodecFailed` for what no encoder has made."""
    reader = Reader(stream)
    tables = [_read_table(reader, each) for each in levels]
    states = reader.take(4 * LANES, "states").view("<u4").astype(np.uint64)
    if (states < LEAST).any():
        raise CodecFailed("states: one is below 65536")
    rest = reader.rest()
    if rest.size % 2:
        raise CodecFailed("words: half of one is left")
    words, used = rest.view("<u2").astype(np.uint64), 0
    made = np.empty((len(levels), count), np.uint8)
    for group, table in zip(made, tables, strict=True):
        symbol_at = np.repeat(np.arange(table.size, dtype=np.uint8), table)
        starts = np.cumsum(table) - table
        share = table[symbol_at].astype(np.uint64)
        rest_at = np.arange(TOTAL, dtype=np.uint64) - starts[symbol_at].astype(np.uint64)
        for begin in range(0, count, LANES):
            x = states[: min(LANES, count - begin)]
            slot = (x & np.uint64(TOTAL - 1)).astype(np.int64)
            group[begin : begin + LANES] = symbol_at[slot]
            x = share[slot] * (x >> np.uint64(BITS)) + rest_at[slot]
            is_small = x < LEAST
            wanted = int(is_small.sum())
            if used + wanted > words.size:
                raise CodecFailed("words: too few")
            x[is_small] = x[is_small] << np.uint64(16) | words[used : used + wanted]
            states[: x.size] = x
            used += wanted
    if used != words.size or (states != LEAST).any():
        raise CodecFailed("words: the states do not end where they began")
    return made


def _table_bytes(table: Frequencies) -> Bytes:
    is_there = np.packbits(table > 0, bitorder="little")
    return np.concatenate((is_there, table[table > 0].astype("<u2").view(np.uint8)))


def _read_table(reader: Reader, levels: int) -> Frequencies:
    bits = reader.take(-(-levels // 8), "table")
    is_there = np.unpackbits(bits, bitorder="little").astype(np.bool_)
    if is_there[levels:].any():
        raise CodecFailed("table: a symbol beyond its levels")
    table = np.zeros(levels, np.int64)
    table[is_there[:levels]] = reader.take(2 * int(is_there.sum()), "table").view("<u2")
    if int(table.sum()) != TOTAL or (table[is_there[:levels]] == 0).any():
        raise CodecFailed(f"table: not {TOTAL} in all")
    return table
