"""Heaps of several engines inside one process, for tests and for the simulated mesh.

Bytes really move. What the kernel does for shm.py (who is alive, who holds which lane), a
:class:`MemoryRegistry` does here: it stands for one host, is passed in, and may let an engine die.
"""

from __future__ import annotations

from microserve.kvcache.heap.mapped import MappedHeap, MappedPeerHeap, require_same_kv
from microserve.kvcache.layout import KvLayout
from microserve.kvcache.words import DEFAULT_NUM_SLOTS, WORD_NBYTES, WordLayout
from microserve.protocol.errors import InternalError, TransferFailed
from microserve.protocol.messages.kv.grant import HeapAddress


class MemoryRegistry:
    """The living heaps of one host, and who holds their lanes."""

    def __init__(self, host: str = "memory") -> None:
        self.host = host
        self._heaps: dict[int, MemoryHeap] = {}
        self._holders: dict[tuple[int, int, int], int] = {}
        """(owner, slot, lane) -> writer."""

    def kill(self, incarnation: int) -> None:
        """The owner's process dies here and now: its heap is gone, and all that it held is let go."""
        self._heaps.pop(incarnation, None)
        self._holders = {lane: writer for lane, writer in self._holders.items() if writer != incarnation}

    def is_alive(self, incarnation: int) -> bool:
        return incarnation in self._heaps

    def _add(self, heap: MemoryHeap) -> None:
        if self._heaps.setdefault(heap.address.incarnation, heap) is not heap:
            raise InternalError(f"incarnation {heap.address.incarnation:#x} is in use")

    def _find(self, address: HeapAddress) -> MemoryHeap:
        if address.kind != "memory" or address.host != self.host:
            raise TransferFailed(
                f"a {address.kind} heap on host {address.host} is out of reach of host {self.host}"
            )
        if (heap := self._heaps.get(address.incarnation)) is None:
            raise TransferFailed(f"the owner {address.incarnation:#x} is gone")
        return heap


class MemoryHeap(MappedHeap):
    def __init__(
        self,
        layout: KvLayout,
        *,
        incarnation: int,
        registry: MemoryRegistry,
        num_slots: int = DEFAULT_NUM_SLOTS,
    ) -> None:
        """:class:`InternalError` if the registry has a heap of that incarnation."""
        words = WordLayout(num_slots, layout.num_layers, layout.num_blocks)
        word_region = memoryview(bytearray(words.num_words * WORD_NBYTES))
        data_region = memoryview(bytearray(layout.data_nbytes))
        address = HeapAddress("memory", registry.host, 0, 0, layout.data_nbytes, incarnation)
        super().__init__(layout, words, address, word_region, data_region)
        self._regions = word_region, data_region
        self._registry = registry
        registry._add(self)

    def is_held(self, slot: int, lane: int) -> bool:
        return (self.address.incarnation, slot, lane) in self._registry._holders

    def attach(self, address: HeapAddress) -> MemoryPeerHeap:
        owner = self._registry._find(address)
        require_same_kv(self.layout, owner.layout)
        return MemoryPeerHeap(self, owner, self._registry)

    def close(self) -> None:
        self._registry.kill(self.address.incarnation)


class MemoryPeerHeap(MappedPeerHeap):
    """A dead writer writes nothing: every method then raises :class:`InternalError`."""

    def __init__(self, writer: MemoryHeap, owner: MemoryHeap, registry: MemoryRegistry) -> None:
        super().__init__(owner.layout, owner.words, owner.address, *owner._regions, writer._regions[1])
        self._registry = registry
        self._writer = writer.address.incarnation

    def hold(self, slot: int, lane: int) -> bool:
        self._require_open()
        key = (self.address.incarnation, slot, lane)
        if key in self._registry._holders:
            return False
        self._registry._holders[key] = self._writer
        self._held.add((slot, lane))
        return True

    def let_go(self, slot: int, lane: int) -> None:
        self._require_open()
        if (slot, lane) in self._held:
            self._held.remove((slot, lane))
            del self._registry._holders[self.address.incarnation, slot, lane]

    def owner_is_dead(self) -> bool:
        self._require_open()
        return not self._registry.is_alive(self.address.incarnation)

    def close(self) -> None:
        if not self._registry.is_alive(self._writer):
            self._held.clear()
        self._detach()

    def _require_open(self) -> None:
        super()._require_open()
        if not self._registry.is_alive(self._writer):
            raise InternalError(f"the dead writer {self._writer:#x} writes")
