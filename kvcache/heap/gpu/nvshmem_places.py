"""Where things are in one rank's symmetric memory, and the host's mirror of its words.

    0         who this is: length, msgpack; last word of the page: 1 while it lives, 0 once it has left
    holders   [slot][lane][rank]: the incarnation of the rank that holds the lane, or 0
    words     words.py
    data      layout.py

Owns offsets and the mirror's copies. Does not know what they are good for (nvshmem.py).
"""

from __future__ import annotations

import mmap
import struct
from typing import Final

import msgspec
import numpy as np

from microserve.kvcache.heap.gpu.cuda_driver import CudaDriver
from microserve.kvcache.layout import KvLayout
from microserve.kvcache.words import WORD_NBYTES, WordLayout
from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.kv.grant import MAX_LANES

PAGE: Final = mmap.PAGESIZE
ALIVE: Final = PAGE - WORD_NBYTES
LENGTH: Final = struct.Struct("<Q")
_LONGEST_INCARNATION: Final = (1 << 64) - 1


class Header(msgspec.Struct, array_like=True):
    incarnation: int
    num_slots: int
    layout: KvLayout


class Places:
    """Offsets in one rank's symmetric memory."""

    def __init__(self, layout: KvLayout, num_slots: int, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.word_layout = WordLayout(num_slots, layout.num_layers, layout.num_blocks)
        self.holders = PAGE
        self.num_holders = num_slots * MAX_LANES * num_ranks
        self.words = self.holders + self.num_holders * WORD_NBYTES
        self.data = -(-(self.words + self.word_layout.num_words * WORD_NBYTES) // PAGE) * PAGE
        self.nbytes = self.data + layout.data_nbytes

    def word(self, word: int) -> int:
        return self.words + word * WORD_NBYTES

    def holder(self, slot: int, lane: int, rank: int) -> int:
        return self.holders + ((slot * MAX_LANES + lane) * self.num_ranks + rank) * WORD_NBYTES


def require_room(layout: KvLayout, num_slots: int, num_ranks: int, capacity_nbytes: int) -> None:
    """:class:`ConfigError` if such a heap does not fit into that much memory of a rank: to be known before
    others are kept waiting."""
    nbytes = Places(layout, num_slots, num_ranks).nbytes
    if nbytes > capacity_nbytes:
        raise ConfigError(
            f"the heap has {nbytes} bytes, a rank's memory {capacity_nbytes}", field="num_blocks"
        )
    header = msgspec.msgpack.encode(Header(_LONGEST_INCARNATION, num_slots, layout))
    if LENGTH.size + len(header) > ALIVE:
        raise ConfigError("the model's name does not fit into a heap's header", field="model")
    if num_ranks * WORD_NBYTES > PAGE:
        raise ConfigError(f"a world of {num_ranks} ranks is too large", field="heap")


class Mirror:
    """Pinned host memory for holders, slot words, and slot words again, each by slot."""

    def __init__(self, places: Places, driver: CudaDriver) -> None:
        num_slots, num_words = places.word_layout.num_slots, places.word_layout.num_slot_words
        total = places.num_holders + 2 * num_words
        self._driver = driver
        self._map = mmap.mmap(-1, -(-total * WORD_NBYTES // PAGE) * PAGE)
        values = np.frombuffer(self._map, np.uint64)
        self._host_address = values.ctypes.data
        self._device_address = driver.register_host(self._host_address, values.nbytes)
        holders, words, again = np.split(values[:total], [places.num_holders, places.num_holders + num_words])
        self.holders = holders.reshape(num_slots, MAX_LANES, -1)
        self.words = words.reshape(num_slots, -1)
        self.again = again.reshape(num_slots, -1)
        self._parts = ((self.holders, places.holders), (self.words, places.words), (self.again, places.words))

    def copy(self, base: int, stream: int) -> None:
        """Holders before words: who let go before the one has its words in the other."""
        for part, offset in self._parts:
            target = self._device_address + part.ctypes.data - self._host_address
            self._driver.copy(target, base + offset, part.nbytes, stream)

    def close(self) -> None:
        self._driver.unregister_host(self._host_address)
