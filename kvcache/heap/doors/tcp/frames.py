"""What the two ends of a door of TCP send each other, as bytes (WIRE.md 10).

A frame is a head of 16 bytes, little-endian, perhaps a table, and of a put the KV itself:

    kind u8 │ 3 bytes │ small u32 │ large u64 │ table │ KV

Owns sizes and bounds. Does not know who sends what when.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

HEAD: Final = struct.Struct("<B3xIQ")
SPAN: Final = struct.Struct("<QI")
"""Of a put: where in the data region, and how many bytes."""
WORD: Final = np.dtype("<u4")

# writer -> owner
PUT, SIGNAL, SIGNAL_EACH, HOLD, LET_GO, READ, SYNC, BEAT = range(1, 9)
"""``PUT``: small spans in the table, large bytes of KV in all. ``SIGNAL``: the word, its value.
``SIGNAL_EACH``: small words in the table, one value. ``HOLD``, ``LET_GO``: ``slot * MAX_LANES + lane``.
``READ``: the word. ``SYNC``: a number."""
# owner -> writer
HELD, BUSY, FREE, VALUE, SYNCED, STATE, TORN = range(33, 40)
"""``HELD``: the lane, and STATE of its slot as it was after the lane was taken. ``BUSY``, ``FREE``: the lane.
``VALUE``: the word and its value. ``SYNCED``: the number of the ``SYNC``. ``STATE``: slot and value, where
it is not what was told before. ``TORN``: the connection ends here, for the reason ``small``. ``BEAT`` is
answered by ``BEAT``."""

LEFT, SILENT, FAULT = 1, 2, 3
"""Reasons of ``TORN``: the owner leaves; nothing was heard for too long; what came is not this protocol."""

MAX_SPANS: Final = 512
MAX_WORDS: Final = 1024
MAX_PUT_NBYTES: Final = 1 << 19
"""KV of one put: what is urgent waits for no more than that."""
MAX_TABLE_NBYTES: Final = max(MAX_SPANS * SPAN.size, MAX_WORDS * WORD.itemsize)


def head(kind: int, small: int = 0, large: int = 0) -> bytes:
    return HEAD.pack(kind, small, large)


def put_frames(
    spans: Iterable[tuple[int, int, int]], source: memoryview
) -> Iterator[list[bytes | memoryview]]:
    """Frames for ``(source, target, nbytes)`` of any number and size: a head with its table, then the KV,
    which is not copied."""
    some: list[tuple[int, int]] = []
    parts: list[memoryview] = []
    room = MAX_PUT_NBYTES
    for start, target, nbytes in spans:
        done = 0
        while done < nbytes:
            count = min(nbytes - done, room)
            some.append((target + done, count))
            parts.append(source[start + done : start + done + count])
            done += count
            room -= count
            if not room or len(some) == MAX_SPANS:
                yield [_put_head(some), *parts]
                some, parts, room = [], [], MAX_PUT_NBYTES
    if some:
        yield [_put_head(some), *parts]


def _put_head(spans: list[tuple[int, int]]) -> bytes:
    nbytes = sum(nbytes for _, nbytes in spans)
    return head(PUT, len(spans), nbytes) + b"".join(SPAN.pack(*span) for span in spans)


def signal_each_frames(words: NDArray[np.int64], value: int) -> Iterator[bytes]:
    for start in range(0, words.size, MAX_WORDS):
        some = words[start : start + MAX_WORDS]
        yield head(SIGNAL_EACH, some.size, value) + some.astype(WORD).tobytes()
