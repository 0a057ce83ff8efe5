"""Heaps whose regions are memory of this process: loads, stores and copies, shared by shm.py and local.py.

    Words     a numpy uint64 array. Reading or writing one aligned element is one 8-byte load or store,
              so a word is never seen half-written; ``struct.pack_into`` or a bytes slice promise no such
              thing.
    Copies    one alone by a slice of memoryviews, which is a memcpy; many by a native call that takes four of
              them at a time (kernels/scatter/host_copy.py), where there is one, or else each by a slice.
              Blocks of 8 KiB that lie anywhere then go as quickly as one contiguous copy, by slices at half
              of its speed; by memcpys in C hardly faster than by slices (benchmarks/heap_put.py).

Order rests on the machine's (total store order, see shm.py) or on there being one process. Owns no
memory, and knows neither who else maps it nor how lanes are held.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from microserve.kernels.scatter.host_copy import SpanCopier
from microserve.kvcache.heap.heap import Copies, Heap, PeerHeap
from microserve.kvcache.layout import KvLayout
from microserve.kvcache.words import WordLayout
from microserve.protocol.errors import InternalError, TransferFailed
from microserve.protocol.messages.kv.grant import HeapAddress


class MappedWords(Heap):
    """An owner whose words are memory of this process, wherever its data may be."""

    _words: NDArray[np.uint64]

    def load(self, word: int) -> int:
        return self._words.item(word)

    def load_each(self, words: NDArray[np.int64]) -> NDArray[np.uint64]:
        return self._words[words]

    def store(self, word: int, value: int) -> None:
        self._words[word] = value

    def poll(self, *, wait: bool = False) -> None:
        """Words are here as soon as they are anywhere."""


class MappedHeap(MappedWords):
    """Subclasses hold lanes, attach and close."""

    data: NDArray[np.uint8]
    """The data region, shape ``[layout.data_nbytes]``, writable."""

    def __init__(
        self,
        layout: KvLayout,
        words: WordLayout,
        address: HeapAddress,
        word_region: memoryview,
        data_region: memoryview,
    ) -> None:
        """The regions are writable, of format ``B``, 8-byte aligned, and exactly as long as needed."""
        self.layout = layout
        self.words = words
        self.address = address
        self.data = np.frombuffer(data_region, np.uint8)
        self._words = np.frombuffer(word_region, np.uint64)

    @property
    def host_data(self) -> NDArray[np.uint8]:
        return self.data

    def read_data(self, start: int, nbytes: int) -> NDArray[np.uint8]:
        return self.data[start : start + nbytes]

    def write_data(self, start: int, content: NDArray[np.uint8]) -> None:
        self.data[start : start + content.size] = content

    def _drop(self) -> None:
        """Our own views of the regions; nothing can be loaded or stored after."""
        self.data = np.empty(0, np.uint8)
        self._words = np.empty(0, np.uint64)


class MappedPeerHeap(PeerHeap):
    """Subclasses hold lanes, tell whether the owner is dead, and close."""

    is_late = False
    takes_payloads = True

    def __init__(
        self,
        layout: KvLayout,
        words: WordLayout,
        address: HeapAddress,
        word_region: memoryview,
        data_region: memoryview,
        source: memoryview,
        copier: SpanCopier | None = None,
    ) -> None:
        """``source`` is our own data region, the others are the peer's; ``copier``: of many copies."""
        self.layout = layout
        self.words = words
        self.address = address
        self._held: set[tuple[int, int]] = set()
        self._is_closed = False
        self._words: NDArray[np.uint64] = np.frombuffer(word_region, np.uint64)
        self._target = data_region
        self._source = source
        self._copier = copier
        # What they are addresses of stays mapped for as long as the views above are held.
        self._target_at, self._source_at = _address(data_region), _address(source)

    def follow(self, stream: int) -> None:
        """Our data region is written by this process's own code: done when the call returns."""
        self._require_open()

    def put(self, copies: Copies, source_shift: int = 0, target_shift: int = 0) -> None:
        self._require_open()
        require_inside(copies, source_shift, target_shift, len(self._source), len(self._target))
        if self._copier is not None and len(copies.copies) > 1:
            spans, num_items = copies.spans.buffer_info()
            at = self._target_at + target_shift, self._source_at + source_shift
            self._copier(*at, spans, num_items // 3)
            return
        source, target = self._source[source_shift:], self._target[target_shift:]
        for target_slice, source_slice in copies.slices:
            target[target_slice] = source[source_slice]

    def put_payload(self, payload: NDArray[np.uint8], copies: Copies, target_shift: int = 0) -> None:
        self._require_open()
        require_inside(copies, 0, target_shift, payload.size, len(self._target))
        source, target = payload.data, self._target[target_shift:]
        for target_slice, source_slice in copies.slices:
            target[target_slice] = source[source_slice]

    def signal(self, word: int, value: int) -> None:
        self._require_open()
        self._words[word] = value

    def signal_each(self, words: NDArray[np.int64], value: int) -> None:
        self._require_open()
        self._words[words] = value

    def read(self, word: int) -> int:
        self._require_open()
        return self._words.item(word)

    def holds(self, slot: int, lane: int) -> bool:
        return (slot, lane) in self._held

    def poll(self, *, wait: bool = False) -> None:
        """Every call was done when it returned."""
        self._require_open()

    @property
    def is_idle(self) -> bool:
        return not self._held

    def _require_open(self) -> None:
        if self._is_closed:
            raise InternalError(f"the peer heap of {self.address.incarnation:#x} is closed")

    def _detach(self) -> bool:
        """Drop the regions; False if that was done before."""
        if self._held:
            raise InternalError(f"close: lanes {sorted(self._held)} are held")
        if self._is_closed:
            return False
        self._is_closed = True
        self._words = np.empty(0, np.uint64)
        self._target = self._source = memoryview(b"")
        self._target_at = self._source_at = 0
        return True


def _address(region: memoryview) -> int:
    return np.frombuffer(region, np.uint8).ctypes.data


def require_inside(
    copies: Copies, source_shift: int, target_shift: int, source_nbytes: int, target_nbytes: int
) -> None:
    """:class:`InternalError` if a copy leaves one of the data regions."""
    for side, shift, end, nbytes in (
        ("source", source_shift, copies.source_end, source_nbytes),
        ("target", target_shift, copies.target_end, target_nbytes),
    ):
        if shift < 0 or shift + end > nbytes:
            raise InternalError(f"put: bytes up to {shift + end} of a {side} of {nbytes}, shift {shift}")


def require_same_kv(mine: KvLayout, theirs: KvLayout) -> None:
    """:class:`TransferFailed` if two engines may not exchange KV."""
    if mine.layout_hash != theirs.layout_hash:
        raise TransferFailed(f"KV is laid out differently: ours {mine}, the peer's {theirs}")
