"""Heaps in shared memory, for engines of one user on one Linux host.

Words and data are one memfd (memfd.py), mapped by its owner and by every peer. All writing is done by the
writer's own process through its mapping, so a free byte lock is proof enough that a lane has no writer.

``hold`` and ``is_held`` both acquire the lane's lock: a writer that finds the lane free after a grant was
closed reads CLOSED. No memory fence is needed in between (x86 lets a load pass an earlier store; "store
the claim, then read STATE" would need one, and Python has none).

Signals need no fence either: x86-64 keeps the order of stores as others see it (TSO), CPython and memcpy
finish a copy before the next bytecode, string instructions are ordered before a later separate store, and
glibc and host_copy.cc end their non-temporal copies with sfence. Other machines, such as aarch64, promise
none of that: they are refused until someone brings a store-release.
"""

from __future__ import annotations

import structlog

from microserve.kernels.scatter.host_copy import span_copier
from microserve.kvcache.heap.heap import PeerHeap
from microserve.kvcache.heap.mapped import MappedHeap, MappedPeerHeap
from microserve.kvcache.heap.memfd import OWNER, HeapFile, MayTake, lane_byte
from microserve.kvcache.layout import K, KvLayout
from microserve.kvcache.words import DEFAULT_NUM_SLOTS
from microserve.protocol import log
from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.kv.grant import HeapAddress

KIND = "shm"
BACK_NBYTES = 16 << 20
"""Memory is taken in parts of about so much."""

_logger = structlog.get_logger()


class ShmView(MappedHeap):
    """An owner's view from another process of the same engine: it reads and stores what is the owner's, and
    its end is not the owner's end. One of them at a time stores a word."""

    def __init__(self, file: HeapFile, address: HeapAddress) -> None:
        span_copier()  # built now if ever, and not by the first put
        self._is_closed = False
        self._file = file
        super().__init__(file.header.layout, file.words, address, file.word_region, file.tail)

    @classmethod
    def open(cls, address: HeapAddress, layout: KvLayout) -> ShmView:
        """Errors as :meth:`attach`."""
        return ShmView(HeapFile.open(address, KIND, layout), address)

    def is_held(self, slot: int, lane: int) -> bool:
        byte = lane_byte(slot, lane)
        try:
            if not self._file.lock(byte):
                return True
            self._file.unlock(byte)
        except OSError:  # no memory for a lock: we cannot know
            return True
        return False

    def attach(self, address: HeapAddress) -> PeerHeap:
        return ShmPeerHeap(self.layout, self._file.tail, address)

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._drop()
            self._file.close()


class ShmHeap(ShmView):
    def __init__(
        self,
        layout: KvLayout,
        *,
        incarnation: int,
        num_slots: int = DEFAULT_NUM_SLOTS,
        may_take: MayTake = lambda nbytes: None,
    ) -> None:
        """Data has memory from :meth:`back` on; ``may_take`` is asked before each part of it.

        :class:`ConfigError` on a machine that is not x86-64 Linux, or without memory for the words.
        """
        self._is_short = False
        self._may_take = may_take
        file = HeapFile.create(
            KIND,
            layout,
            incarnation=incarnation,
            num_slots=num_slots,
            tail_nbytes=layout.data_nbytes,
            tail_has_memory=False,
        )
        super().__init__(file, file.address)

    def back(self, first: int, count: int) -> int:
        """Some MiB at a time, for which a step waits some milliseconds, and no put of a peer does."""
        layout = self.layout
        step = max(count, BACK_NBYTES // (layout.num_layers * layout.block_nbytes))
        end = min(first + step, layout.num_blocks)
        nbytes = (end - first) * layout.block_nbytes
        try:
            self._may_take(nbytes * layout.num_layers)
            for layer in range(layout.num_layers):
                self._file.back(layout.offset(layer, first, K, 0), nbytes)
        except (ConfigError, OSError) as error:
            if not self._is_short:
                _logger.warning(log.POOL_SHORT, blocks=first, of=layout.num_blocks, error=str(error))
            self._is_short = True
            return first
        self._is_short = False
        return end

    def close(self) -> None:
        if not self._is_closed:
            self._file.unlock(OWNER)
        super().close()


class ShmPeerHeap(MappedPeerHeap):
    def __init__(self, mine: KvLayout, source: memoryview, address: HeapAddress) -> None:
        self._file = file = HeapFile.open(address, KIND, mine)
        super().__init__(
            file.header.layout, file.words, address, file.word_region, file.tail, source, span_copier()
        )

    def hold(self, slot: int, lane: int) -> bool:
        self._require_open()
        # The kernel would let one description take its own lock again.
        if (slot, lane) in self._held or not self._file.lock(lane_byte(slot, lane)):
            return False
        self._held.add((slot, lane))
        return True

    def let_go(self, slot: int, lane: int) -> None:
        self._require_open()
        if (slot, lane) in self._held:
            self._file.unlock(lane_byte(slot, lane))
            self._held.remove((slot, lane))

    def owner_is_dead(self) -> bool:
        self._require_open()
        try:
            return not self._file.is_locked(OWNER)
        except OSError:
            return False

    def close(self) -> None:
        if self._detach():
            self._file.close()
