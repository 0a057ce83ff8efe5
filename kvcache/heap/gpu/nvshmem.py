"""Heaps in the symmetric memory of one NVSHMEM world: engines that start together, and end together.

    symmetric memory of a rank    who it is │ holders │ words │ data        (nvshmem_places.py)

All of it is device memory, so the owner's host reads its words from a mirror: ``poll`` enqueues copies of
the holders, of the slot words, and of the slot words again into pinned host memory, and takes them over when
they are done. CUDA promises no order for the bytes of one copy: it may show a count and not the checksum that
was stored before, or half of a word. So a slot is taken over only if both copies of its words are equal: what
the first shows was there before the second began, and so was all that had been stored before it. A slot that
changes in between keeps its older words until the next ``poll``. Tags are not mirrored: they are read, and
waited for, when a layer is verified.

A signal is seen at the second ``poll`` after it came, mostly. A ``store`` waits for the mirror's copies that
are before it in its stream; nothing else blocks, and no stream ever waits for a signal, so a sender that dies
leaves nothing stuck (``signal_wait`` would even end the process where ranks share a GPU). A kernel launched
once a word was seen reads the data that came before it.

Order is that of one stream (device.py): for a peer that is mapped, NVSHMEM's put on a stream is a copy in it,
and its signal a stream write with a fence before it. A peer that is not mapped (another transport than NVLink
or PCIe between GPUs) is refused: whether its data is visible with its signal is an open question there.

Holding. No kernel knows who lives on all hosts, so holding is a protocol of words here, with one word for
each (lane, rank), which only that rank writes:

    writer   its word := itself ── quiet ── read the lane's words, all ranks ── somebody there? its word := 0
    owner    STATE := CLOSED ── (same stream) mirror ── all words of the lane 0? the lane is free

Each side writes first and reads after, so of two that meet one at least sees the other: a writer that the
owner did not see reads CLOSED. Two writers that meet may both give way. The word becomes 0 in stream order,
after the last put. A mirror of the slot that is older than the owner's last store to it says held.

Whoever is outside of the world cannot write here. The other way it goes: a receiver's address says how it is
written, and a ``cuda_ipc`` heap on our host is written as by anybody there (cuda_ipc.py).

Proof of death comes from outside: a word stays until its rank let go, or until ``report_dead`` is called by
someone who knows that the process is gone with its GPU work (its host's supervisor; cuda_ipc.py says what
that takes). Words that a dead rank holds count for nothing from then on, for owner and writers alike.

Owns this kind of heap. Does not know how a world comes about (nvshmem_world.py).
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from microserve.kvcache.heap.gpu import cuda_ipc
from microserve.kvcache.heap.gpu.cuda_driver import CudaDriver
from microserve.kvcache.heap.gpu.cuda_ipc import CudaIpcPeerHeap
from microserve.kvcache.heap.gpu.device import (
    BlockPut,
    DeviceHeap,
    DevicePeerHeap,
    DeviceRegion,
    copy_from_host,
    copy_to_host,
)
from microserve.kvcache.heap.gpu.nvshmem_places import (
    ALIVE,
    LENGTH,
    PAGE,
    Header,
    Mirror,
    Places,
    require_room,
)
from microserve.kvcache.heap.gpu.nvshmem_world import SymmetricMemory
from microserve.kvcache.heap.mapped import require_same_kv
from microserve.kvcache.layout import KvLayout
from microserve.kvcache.words import DEFAULT_NUM_SLOTS, POISON, WORD_NBYTES
from microserve.protocol.errors import ConfigError, InternalError, TransferFailed
from microserve.protocol.messages.kv.grant import HeapAddress

KIND: Final = "nvshmem"
_MAX_TRIES: Final = 100
"""Mirrors that ``poll(wait=True)`` takes to find one during which no slot changed."""


class NvshmemHeap(DeviceHeap):
    def __init__(
        self,
        layout: KvLayout,
        *,
        incarnation: int,
        world: SymmetricMemory,
        driver: CudaDriver,
        capacity_nbytes: int,
        num_slots: int = DEFAULT_NUM_SLOTS,
        block_put: BlockPut | None = None,
    ) -> None:
        """Collective: blocks until all ranks do the same. ``capacity_nbytes`` is what each of them takes,
        for the largest pool among them. :class:`ConfigError` if ours does not fit into it."""
        self._places = places = Places(layout, num_slots, world.num_ranks)
        header = msgspec.msgpack.encode(Header(incarnation, num_slots, layout))
        require_room(layout, num_slots, world.num_ranks, capacity_nbytes)
        self.world = world
        self.block_put = block_put
        """How peers put many runs at once; None: one copy each."""
        self.base = world.allocate(capacity_nbytes)
        driver.clear(self.base, capacity_nbytes)
        super().__init__(
            layout,
            places.word_layout,
            HeapAddress(KIND, world.name, world.rank, 0, capacity_nbytes, incarnation),
            DeviceRegion(self.base + places.data, layout.data_nbytes),
            driver,
        )
        page = np.zeros(PAGE, np.uint8)
        page[: LENGTH.size + len(header)] = np.frombuffer(LENGTH.pack(len(header)) + header, np.uint8)
        page[ALIVE:].view(np.uint64)[0] = 1
        copy_from_host(driver, self.base, page)
        # Nobody reads or writes another's memory before it is in this state.
        world.barrier()
        self.dead: set[int] = set()
        """Incarnations that are proven dead."""
        self.taken: set[tuple[int, int, int]] = set()
        """(rank, slot, lane) that some PeerHeap of ours holds."""
        self._stream = driver.create_stream()
        self._mirror = Mirror(places, driver)
        self._copying: tuple[int, int] | None = None
        """The event of the mirror's copies on their way, and how many stores came before them."""
        self._slot_words = np.zeros_like(self._mirror.words)
        self._holders = np.zeros_like(self._mirror.holders)
        self._num_stores = 0
        self._num_seen = np.zeros(num_slots, np.int64)
        """By slot: how many stores came before what is known of it."""
        self._stored: dict[int, tuple[int, int]] = {}
        """Slot words that the mirror does not show yet: value, and which store it was."""
        self._is_closed = False
        self.poll(wait=True)

    def load(self, word: int) -> int:
        if (stored := self._stored.get(word)) is not None:
            return stored[0]
        if word < self.words.num_slot_words:
            return self._slot_words.item(word)
        return int(self.load_each(np.array([word]))[0])

    def load_each(self, words: NDArray[np.int64]) -> NDArray[np.uint64]:
        if not words.size:
            return np.empty(0, np.uint64)
        if words.max() < self.words.num_slot_words:
            values = self._slot_words.reshape(-1)[words]
        else:
            start = int(words.min())
            span = np.empty(int(words.max()) - start + 1, np.uint64)
            self._driver.synchronize(self._stream)
            copy_to_host(self._driver, span.view(np.uint8), self.word_address(start))
            values = span[words - start]
        for index, word in enumerate(words.tolist() if self._stored else ()):
            if word in self._stored:
                values[index] = self._stored[word][0]
        return values

    def store(self, word: int, value: int) -> None:
        self._driver.write_values([self.word_address(word)], value, self._stream)
        if word < self.words.num_slot_words:
            self._num_stores += 1
            self._stored[word] = value, self._num_stores
        # Whoever is told of it by a message finds it: a grant's writer would take it for closed.
        self._driver.synchronize(self._stream)

    def poll(self, *, wait: bool = False) -> None:
        self._take_over()
        for _ in range(_MAX_TRIES if wait else 1):
            if self._copying is None:
                self._mirror.copy(self.base, self._stream)
                self._copying = self._driver.record(self._stream), self._num_stores
            if wait:
                self._driver.synchronize(self._stream)
                if self._take_over():
                    return

    def is_held(self, slot: int, lane: int) -> bool:
        # What we stored last, our state of the slot, is not known to have been there before the look.
        if any(self._slot_of(word) == slot for word in self._stored):
            return True
        return any(holder and holder not in self.dead for holder in self._holders[slot, lane].tolist())

    def _take_over(self) -> bool:
        """Take what the mirror has brought, if it is done; whether that was all slots."""
        if self._copying is None or not self._driver.is_done(self._copying[0]):
            return False
        event, num_stores = self._copying
        self._driver.destroy_event(event)
        self._copying = None
        is_still = self._is_still()
        self._slot_words[is_still] = self._mirror.again[is_still]
        self._holders[is_still] = self._mirror.holders[is_still]
        self._num_seen[is_still] = num_stores
        self._stored = {
            word: stored
            for word, stored in self._stored.items()
            if stored[1] > self._num_seen[self._slot_of(word)]
        }
        return bool(is_still.all())

    def _is_still(self) -> NDArray[np.bool_]:
        """By slot: nothing changed between the two copies."""
        still: NDArray[np.bool_] = (self._mirror.words == self._mirror.again).all(axis=1)
        return still

    def _slot_of(self, word: int) -> int:
        return word // self._slot_words.shape[1]

    def report_dead(self, incarnation: int) -> None:
        """That engine is gone with all of its GPU work, as somebody outside can prove."""
        self.dead.add(incarnation)

    def attach(self, address: HeapAddress) -> DevicePeerHeap:
        """Of our world, or a ``cuda_ipc`` heap on our host, whose engine may come and go."""
        if address.kind == cuda_ipc.KIND:
            return CudaIpcPeerHeap(self.layout, self.data, address, self._driver, self.block_put)
        return NvshmemPeerHeap(self, address, self._driver)

    def word_address(self, word: int) -> int:
        return self.base + self._places.word(word)

    def poison(self, word: int) -> None:
        self.store(word, self.load(word) | POISON)

    def close(self) -> None:
        """The symmetric memory stays: giving it back takes all ranks (``world.leave``, or their end)."""
        if self._is_closed:
            return
        self._is_closed = True
        self._driver.write_values([self.base + ALIVE], 0, self._stream)
        self._driver.synchronize(self._stream)
        self._driver.destroy_stream(self._stream)
        self._mirror.close()


class NvshmemPeerHeap(DevicePeerHeap):
    """``hold``, ``read`` and ``owner_is_dead`` ask the peer's device and wait, on a stream of their own."""

    def __init__(self, mine: NvshmemHeap, address: HeapAddress, driver: CudaDriver) -> None:
        world = mine.world
        if address.kind != KIND or address.host != world.name or not 0 <= address.pid < world.num_ranks:
            raise TransferFailed(
                f"rank {address.pid} of {address.kind} {address.host} is out of reach of {KIND} {world.name}"
            )
        if address.incarnation in mine.dead:
            raise TransferFailed(f"the owner {address.incarnation:#x} is gone: it is dead")
        self._mine = mine
        self._world = world
        self._rank = address.pid
        self._mapped = world.mapped_address(mine.base, self._rank)
        if not self._mapped:
            raise TransferFailed(f"rank {self._rank} is out of reach: its memory is not mapped here")
        self._driver = driver
        self._asking = driver.create_stream()
        self._scratch = driver.allocate(PAGE)
        try:
            header = self._read_header(address)
            require_same_kv(mine.layout, header.layout)
        except BaseException:
            self._stop_asking()
            raise
        self._places = Places(header.layout, header.num_slots, world.num_ranks)
        super().__init__(
            *(header.layout, self._places.word_layout, address, mine.data),
            *(mine.base + self._places.data, driver, mine.block_put),
        )

    def read(self, word: int) -> int:
        self._require_open()
        return int(self._fetch(self._places.word(word), WORD_NBYTES).view(np.uint64)[0])

    def owner_is_dead(self) -> bool:
        self._require_open()
        if self.address.incarnation in self._mine.dead:
            return True
        return not self._fetch(ALIVE, WORD_NBYTES).any()

    @property
    def mapped_target(self) -> int:
        return self._mapped + self._places.data

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        self._world.put(target, source, nbytes, self._rank, self.stream)

    def _write(self, words: list[int], value: int) -> None:
        if len(words) == 1:
            word = self._mine.base + self._places.word(words[0])
            self._world.signal(word, value, self._rank, self.stream)
        else:
            # What a signal to a mapped rank is inside, many at a time.
            addresses = [self._mapped + self._places.word(word) for word in words]
            self._driver.write_values(addresses, value, self.stream)

    def _take(self, slot: int, lane: int) -> bool:
        key = self._rank, slot, lane
        if key in self._mine.taken:
            return False
        self._signal_holder(slot, lane, self._mine.address.incarnation, self._asking)
        self._world.quiet(self._asking)
        row = self._fetch(self._places.holder(slot, lane, 0), self._places.num_ranks * WORD_NBYTES)
        holders = row.view(np.uint64).tolist()
        del holders[self._world.rank]
        if any(holder and holder not in self._mine.dead for holder in holders):
            self._clear_holder(slot, lane)
            return False
        self._mine.taken.add(key)
        return True

    def _leave(self, slot: int, lane: int) -> None:
        self._signal_holder(slot, lane, 0, self.stream)

    def _give_back(self, slot: int, lane: int) -> None:
        self._clear_holder(slot, lane)
        self._release(slot, lane)

    def _release(self, slot: int, lane: int) -> None:
        self._mine.taken.remove((self._rank, slot, lane))

    def _detach(self) -> None:
        self._stop_asking()

    def _clear_holder(self, slot: int, lane: int) -> None:
        """Of a lane that nothing was written through; blocks."""
        self._signal_holder(slot, lane, 0, self._asking)
        self._driver.synchronize(self._asking)

    def _signal_holder(self, slot: int, lane: int, value: int, stream: int) -> None:
        word = self._mine.base + self._places.holder(slot, lane, self._world.rank)
        self._world.signal(word, value, self._rank, stream)

    def _fetch(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Bytes of the peer's memory; blocks."""
        if nbytes > PAGE:
            raise InternalError(f"{nbytes} bytes are more than the scratch page")
        content = np.empty(nbytes, np.uint8)
        self._world.get(self._scratch, self._mine.base + offset, nbytes, self._rank, self._asking)
        self._driver.copy(content.ctypes.data, self._scratch, nbytes, self._asking)
        self._driver.synchronize(self._asking)
        return content

    def _stop_asking(self) -> None:
        self._driver.destroy_stream(self._asking)
        self._driver.free(self._scratch)

    def _read_header(self, address: HeapAddress) -> Header:
        page = self._fetch(0, PAGE).tobytes()
        (length,) = LENGTH.unpack_from(page)
        try:
            header = msgspec.msgpack.decode(page[LENGTH.size : LENGTH.size + length], type=Header)
        except (msgspec.MsgspecError, ConfigError) as error:
            raise TransferFailed(f"the heap's header does not decode: {error}") from error
        if header.incarnation != address.incarnation or not any(page[ALIVE:]):
            raise TransferFailed(f"the owner {address.incarnation:#x} of rank {self._rank} is gone")
        return header
