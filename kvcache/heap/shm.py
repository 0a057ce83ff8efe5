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

from microserve.kernels.scatter.host_copy import span_copier
from microserve.kvcache.heap.mapped import MappedHeap, MappedPeerHeap
from microserve.kvcache.heap.memfd import OWNER, HeapFile, MayTake, lane_byte
from microserve.kvcache.layout import KvLayout
from microserve.kvcache.words import DEFAULT_NUM_SLOTS
from microserve.protocol.messages.grant import HeapAddress

KIND = "shm"


class ShmHeap(MappedHeap):
    def __init__(
        self,
        layout: KvLayout,
        *,
        incarnation: int,
        num_slots: int = DEFAULT_NUM_SLOTS,
        may_take: MayTake = lambda nbytes: None,
    ) -> None:
        """Takes and touches all of its memory now (seconds for many GiB), so that no put waits for a page;
        ``may_take`` is asked before each step of it.

        :class:`ConfigError` on a machine that is not x86-64 Linux, or without that much memory.
        """
        self._is_closed = False
        span_copier()  # built now if ever, and not by the first put
        self._file = HeapFile.create(
            KIND,
            layout,
            incarnation=incarnation,
            num_slots=num_slots,
            tail_nbytes=layout.data_nbytes,
            may_take=may_take,
        )
        super().__init__(
            layout, self._file.words, self._file.address, self._file.word_region, self._file.tail
        )

    def is_held(self, slot: int, lane: int) -> bool:
        byte = lane_byte(slot, lane)
        try:
            if not self._file.lock(byte):
                return True
            self._file.unlock(byte)
        except OSError:  # no memory for a lock: we cannot know
            return True
        return False

    def attach(self, address: HeapAddress) -> ShmPeerHeap:
        """Touches every page of the peer's heap: about 0.1 s a GiB, once."""
        return ShmPeerHeap(self.layout, self._file.tail, address)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._file.unlock(OWNER)
        self._drop()
        self._file.close()


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
