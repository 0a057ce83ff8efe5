"""What comes from one writer, byte by byte: KV straight into the data region, everything else as frames;
sans-I/O.

    buffers   where the next bytes go, in this order: what is missing of a put's spans, then the staging
    received  so many have come: the frames that are whole now, in order, one at a time

A put's spans are checked against the data region before the first of their bytes is asked for. A frame is
handed out after every byte that came before it is in its place, so who applies frames as they come keeps
their order. What a put brings together with its head, some KiB at most, is copied once more; the rest is
not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from microserve.kvcache.heap.doors.tcp import frames
from microserve.protocol.errors import ProtocolViolation

_STAGING_NBYTES: Final = frames.HEAD.size + frames.MAX_TABLE_NBYTES


class Frame(NamedTuple):
    kind: int
    small: int
    large: int


class SignalEach(NamedTuple):
    words: NDArray[np.uint32]
    value: int


class Inbound:
    """For one connection whose writer is known."""

    def __init__(self, data: memoryview, num_words: int, num_lanes: int) -> None:
        self._data = data
        self._num_words, self._num_lanes = num_words, num_lanes
        self._staging = bytearray(_STAGING_NBYTES)
        self._view = memoryview(self._staging)
        self._start = self._end = 0
        self._targets: list[memoryview] = []
        """Of the put that is under way, what is missing; the next one last."""

    def buffers(self) -> list[memoryview]:
        """Never empty, and at most ``MAX_SPANS + 1`` of them."""
        return [*reversed(self._targets), self._view[self._end :]]

    def received(self, nbytes: int) -> Iterator[Frame | SignalEach]:
        """To be gone through to its end. :class:`ProtocolViolation`: nothing more may be taken from there."""
        nbytes -= self._fill(nbytes)
        self._end += nbytes
        while True:
            if self._targets and not self._move_staged():
                break
            if self._end - self._start < frames.HEAD.size:
                break
            kind, small, large = frames.HEAD.unpack_from(self._staging, self._start)
            table = self._start + frames.HEAD.size
            after = table + self._table_nbytes(kind, small)
            if after > self._end:
                break
            if kind == frames.PUT:
                self._targets = self._spans(table, small, large)
                self._start = after
                continue
            self._start = after
            if kind == frames.SIGNAL_EACH:
                words = np.frombuffer(self._staging, frames.WORD, small, table).copy()
                if words.size and words.max() >= self._num_words:
                    raise ProtocolViolation(f"word {words.max()} of {self._num_words}")
                yield SignalEach(words, large)
                continue
            self._check(kind, small)
            yield Frame(kind, small, large)
        self._make_room()

    @property
    def is_between_frames(self) -> bool:
        """Nothing is half here."""
        return not self._targets and self._start == self._end

    def _fill(self, nbytes: int) -> int:
        """So many bytes have come into the targets first; returns how many these took."""
        left = nbytes
        while left and self._targets:
            target = self._targets.pop()
            if len(target) > left:
                self._targets.append(target[left:])
                return nbytes
            left -= len(target)
        return nbytes - left

    def _move_staged(self) -> bool:
        """KV that came with its head; True when the put is whole."""
        while self._targets and self._start < self._end:
            target = self._targets.pop()
            nbytes = min(len(target), self._end - self._start)
            target[:nbytes] = self._view[self._start : self._start + nbytes]
            self._start += nbytes
            if nbytes < len(target):
                self._targets.append(target[nbytes:])
        return not self._targets

    def _make_room(self) -> None:
        left = self._end - self._start
        if self._start:
            self._staging[:left] = self._staging[self._start : self._end]
        self._start, self._end = 0, left

    def _table_nbytes(self, kind: int, small: int) -> int:
        if kind == frames.PUT:
            if not 1 <= small <= frames.MAX_SPANS:
                raise ProtocolViolation(f"a put of {small} spans, at most {frames.MAX_SPANS}")
            return small * frames.SPAN.size
        if kind == frames.SIGNAL_EACH:
            if small > frames.MAX_WORDS:
                raise ProtocolViolation(f"{small} words at once, at most {frames.MAX_WORDS}")
            return small * frames.WORD.itemsize
        return 0

    def _spans(self, table: int, count: int, total: int) -> list[memoryview]:
        targets = []
        for number in range(count):
            target, nbytes = frames.SPAN.unpack_from(self._staging, table + number * frames.SPAN.size)
            if not 0 < nbytes <= frames.MAX_PUT_NBYTES or target + nbytes > len(self._data):
                raise ProtocolViolation(f"{nbytes} bytes at {target} of {len(self._data)}")
            total -= nbytes
            targets.append(self._data[target : target + nbytes])
        if total:
            raise ProtocolViolation(f"a put whose spans have {total} bytes less than it says")
        targets.reverse()
        return targets

    def _check(self, kind: int, small: int) -> None:
        bounds = {
            frames.SIGNAL: self._num_words,
            frames.READ: self._num_words,
            frames.HOLD: self._num_lanes,
            frames.LET_GO: self._num_lanes,
            frames.SYNC: 1 << 32,
            frames.BEAT: 1 << 32,
        }
        bound = bounds.get(kind)
        if bound is None:
            raise ProtocolViolation(f"no frame of a writer is of kind {kind}")
        if small >= bound:
            raise ProtocolViolation(f"frame {kind} names {small} of {bound}")

    def drop(self) -> None:
        """Let go of the data region: nothing more is put into it."""
        self._targets = []
        self._data = self._view = memoryview(b"")
