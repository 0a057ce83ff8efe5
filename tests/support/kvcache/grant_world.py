"""A receiving engine and senders that come and go, for the grant tests."""

from __future__ import annotations

from collections.abc import Callable

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.grant.table import GrantTable
from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.heap.local import MemoryHeap, MemoryPeerHeap, MemoryRegistry
from microserve.protocol.messages.kv.grant import Grant
from tests.support.kvcache.kv_samples import fill, make_layout

RECEIVER = 9
LEASE_S = 5.0
NUM_SLOTS = 3
SEED = 4


class HookedPeer(MemoryPeerHeap):
    """Lets the world move on at the two moments of a claim that matter."""

    def __init__(self, writer: MemoryHeap, owner: MemoryHeap, registry: MemoryRegistry) -> None:
        super().__init__(writer, owner, registry)
        self.before_hold: Callable[[], None] = lambda: None
        self.after_hold: Callable[[], None] = lambda: None
        self.before_put: Callable[[], None] = lambda: None

    def hold(self, slot: int, lane: int) -> bool:
        self.before_hold()
        is_mine = super().hold(slot, lane)
        self.after_hold()
        return is_mine

    def put(self, *arguments, **named) -> None:  # type: ignore[no-untyped-def]
        self.before_put()
        super().put(*arguments, **named)


class HookedHeap(MemoryHeap):
    after_asked: Callable[[], None] = staticmethod(lambda: None)

    def is_held(self, slot: int, lane: int) -> bool:
        answer = super().is_held(slot, lane)
        self.after_asked()
        return answer


class Receiver:
    """A receiving engine with 12 blocks of 4 tokens, and senders that come and go."""

    def __init__(self) -> None:
        self.registry = MemoryRegistry()
        self.heap = HookedHeap(
            make_layout(num_blocks=12), incarnation=RECEIVER, registry=self.registry, num_slots=NUM_SLOTS
        )
        self.pool = BlockPool(12)
        self.table = self.make_table(self.heap)
        self.source_blocks = [3, 0, 2, 1]
        self._senders = 100

    def make_table(self, heap: Heap) -> GrantTable:
        return GrantTable(
            *(heap, self.pool),
            engine_id="e",
            incarnation=RECEIVER,
            lease_s=LEASE_S,
            verify_checksums=True,
        )

    def open(self, *, matched: int = 0, end: int = 16, now: float = 0.0, owner: str = "router") -> Grant:
        matched_blocks = self.pool.allocate(matched // 4)
        blocks = self.pool.allocate(self.heap.layout.num_blocks_for(end - matched))
        return self.table.open("request", owner, matched_blocks, matched, blocks, end, now)

    def sender(self) -> HookedPeer:
        """A new process, with 16 tokens of KV, attached."""
        self._senders += 1
        self.sending = MemoryHeap(make_layout(), incarnation=self._senders, registry=self.registry)
        fill(self.sending, self.source_blocks, 16, SEED)
        return HookedPeer(self.sending, self.heap, self.registry)

    def writer(
        self, grant: Grant, lane: int = 0, begin: int = 0, end: int = 16, *, checksums: bool = True
    ) -> LaneWriter:
        peer = self.sender()
        return LaneWriter(self.sending, peer, grant, lane, begin, min(end, grant.end), checksums=checksums)

    def send(self, grant: Grant, lane: int = 0, begin: int = 0, end: int = 16) -> None:
        """A whole transfer of one lane."""
        writer = self.writer(grant, lane, begin, end)
        writer.claim()
        self.put_all(writer, begin, end)
        writer.finish()

    def put_all(self, writer: LaneWriter, begin: int = 0, end: int = 16) -> None:
        for layer in range(2):
            writer.put_layer(layer, self.source_blocks, begin, end)

    def check(self) -> None:
        self.table.check_integrity()
        self.pool.check_integrity()
