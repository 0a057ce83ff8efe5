"""What heaps whose data is device memory have in common: the region, and puts that a stream carries out.

    compute stream    ── layer k ──●                      follow: an event
    peer's stream                  └─wait─ copies ─ write tags ─ write arrival ─●
    host                                                            let_go: an event; poll: is it done?

All that a PeerHeap writes goes through its one stream, so order is the stream's (cuda_driver.py). Nothing
here waits but ``poll(wait=True)``, ``close`` and the calls for tests and checksums.

``DevicePeerHeap.put`` is one driver copy for each run of blocks, or one launch for all of them where a
:class:`BlockPut` is given (kernel_put.py). Either is in the peer's stream, so the ``signal`` that follows
stays ordered.

Owns these. Does not know where the words are, nor how lanes are held.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from microserve.kvcache.heap.gpu.cuda_driver import CudaDriver
from microserve.kvcache.heap.heap import Copies, Heap, PeerHeap
from microserve.kvcache.heap.mapped import require_inside
from microserve.kvcache.layout import KvLayout
from microserve.kvcache.words import WordLayout
from microserve.protocol.errors import InternalError
from microserve.protocol.messages.kv.grant import HeapAddress

MIN_RUNS_OF_A_LAUNCH: Final = 4
"""Fewer runs of blocks than that are left to the copy engines, which take no multiprocessor."""


class BlockPut(Protocol):
    def __call__(self, copies: Copies, source: int, target: int, stream: int) -> bool:
        """Enqueue all copies in the stream; their offsets count from the addresses ``source`` and ``target``.
        False: none of them, as the device has no memory left for it.

        The same set is put again for the next layer, from other addresses."""


class DeviceRegion:
    """A run of device memory that torch and cupy view without copying: ``torch.as_tensor(region)``.

    Views keep the region alive.
    """

    def __init__(self, address: int, nbytes: int) -> None:
        self.address = address
        self.nbytes = nbytes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}

    def free_with_last_view(self, driver: CudaDriver) -> None:
        """Give the memory back once nobody views it. Never at the process's end, which does so itself."""
        weakref.finalize(self, driver.free, self.address).atexit = False


class DeviceHeap(Heap):
    """Subclasses keep the words, hold lanes, attach and close."""

    data: DeviceRegion
    """The data region."""

    def __init__(
        self,
        layout: KvLayout,
        words: WordLayout,
        address: HeapAddress,
        data: DeviceRegion,
        driver: CudaDriver,
    ) -> None:
        self.layout = layout
        self.words = words
        self.address = address
        self.data = data
        self._driver = driver

    def read_data(self, start: int, nbytes: int) -> NDArray[np.uint8]:
        content = np.empty(nbytes, np.uint8)
        self._driver.synchronize(None)
        copy_to_host(self._driver, content, self.data.address + start)
        return content

    def write_data(self, start: int, content: NDArray[np.uint8]) -> None:
        self._driver.synchronize(None)
        copy_from_host(self._driver, self.data.address + start, np.ascontiguousarray(content))

    @abstractmethod
    def word_address(self, word: int) -> int:
        """Where the device finds a word of ours."""

    def enqueue_wait(self, stream: int, word: int, value: int) -> None:
        """What is enqueued in ``stream`` later comes when the word is at least ``value``.

        For a stream of its own: CUDA does not see this order, and work that others need, queued behind the
        wait, can deadlock. The stream is stuck if the value never comes; ``poison`` then lets it go on, so
        look for POISON in the word before using anything.
        """
        self._driver.wait_value(self.word_address(word), value, stream)

    @abstractmethod
    def poison(self, word: int) -> None:
        """Let go the streams that wait for a word whose writer is proven dead: POISON is in it from now on,
        and its count may be lost."""


class DevicePeerHeap(PeerHeap):
    """Subclasses write words, hold lanes, tell whether the owner is dead, and detach."""

    def __init__(
        self,
        layout: KvLayout,
        words: WordLayout,
        address: HeapAddress,
        source: DeviceRegion,
        target_address: int,
        driver: CudaDriver,
        block_put: BlockPut | None = None,
    ) -> None:
        """``source`` is our own data region, ``target_address`` the peer's as ``_copy`` is told it."""
        self.layout = layout
        self.words = words
        self.address = address
        self.target_address = target_address
        self.stream = driver.create_stream()
        self._driver = driver
        self._block_put = block_put
        self._source = source
        self._held: dict[tuple[int, int], int] = {}
        """Lanes, with what ``_num_enqueued`` was when we took them."""
        self._num_enqueued = 0
        self._leaving: dict[tuple[int, int], int] = {}
        """Lanes that were let go, with the event of their last write."""
        self._is_closed = False

    @property
    def mapped_target(self) -> int:
        """Where a kernel of ours writes the peer's data region."""
        return self.target_address

    def follow(self, stream: int) -> None:
        self._require_open()
        event = self._driver.record(stream)
        self._driver.wait_event(self.stream, event)
        # The wait stands: the driver frees an event after its last use.
        self._driver.destroy_event(event)

    def put(self, copies: Copies, source_shift: int = 0, target_shift: int = 0) -> None:
        self._require_open()
        self._num_enqueued += 1
        require_inside(copies, source_shift, target_shift, self._source.nbytes, self.layout.data_nbytes)
        source, target = self._source.address + source_shift, self.target_address + target_shift
        if self._block_put is not None and len(copies.copies) >= MIN_RUNS_OF_A_LAUNCH:
            mapped = self.mapped_target + target_shift
            if self._block_put(copies, source, mapped, self.stream):
                return
        for copy in copies.copies:
            if copy.nbytes:
                self._copy(target + copy.target, source + copy.source, copy.nbytes)

    def signal(self, word: int, value: int) -> None:
        self._require_open()
        self._num_enqueued += 1
        self._write([word], value)

    def signal_each(self, words: NDArray[np.int64], value: int) -> None:
        self._require_open()
        self._num_enqueued += 1
        self._write(words.tolist(), value)

    def hold(self, slot: int, lane: int) -> bool:
        self._require_open()
        if self.holds(slot, lane) or not self._take(slot, lane):
            return False
        self._held[slot, lane] = self._num_enqueued
        return True

    def let_go(self, slot: int, lane: int) -> None:
        self._require_open()
        if (slot, lane) not in self._held:
            return
        if self._held[slot, lane] == self._num_enqueued:
            # Nothing went through it: it need not wait for what the stream does for other lanes.
            self._give_back(slot, lane)
        else:
            self._leave(slot, lane)
            self._leaving[slot, lane] = self._driver.record(self.stream)
        del self._held[slot, lane]

    def holds(self, slot: int, lane: int) -> bool:
        return (slot, lane) in self._held or (slot, lane) in self._leaving

    def poll(self, *, wait: bool = False) -> None:
        self._require_open()
        if wait:
            self._driver.synchronize(self.stream)
        for (slot, lane), event in list(self._leaving.items()):
            if self._driver.is_done(event):
                self._driver.destroy_event(event)
                del self._leaving[slot, lane]
                self._release(slot, lane)

    @property
    def is_idle(self) -> bool:
        return not self._held and not self._leaving

    def close(self) -> None:
        if self._held:
            raise InternalError(f"close: lanes {sorted(self._held)} are held")
        if not self._is_closed:
            self.poll(wait=True)
            self._driver.destroy_stream(self.stream)
            self._is_closed = True
            self._source = DeviceRegion(0, 0)
            self._detach()

    def _require_open(self) -> None:
        if self._is_closed:
            raise InternalError(f"the peer heap of {self.address.incarnation:#x} is closed")

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        """Enqueue it in the stream."""
        self._driver.copy(target, source, nbytes, self.stream)

    @abstractmethod
    def _write(self, words: list[int], value: int) -> None:
        """Enqueue stores of words in the stream, each after all that was enqueued before."""

    @abstractmethod
    def _take(self, slot: int, lane: int) -> bool:
        """Hold the lane against others, or say at once that somebody has it."""

    @abstractmethod
    def _leave(self, slot: int, lane: int) -> None:
        """The last write of the lane has been enqueued."""

    @abstractmethod
    def _give_back(self, slot: int, lane: int) -> None:
        """Leave and release a lane that nothing was written through."""

    @abstractmethod
    def _release(self, slot: int, lane: int) -> None:
        """The last write of the lane is done."""

    @abstractmethod
    def _detach(self) -> None:
        """Give up the peer's memory; nothing is on its way."""


def copy_to_host(driver: CudaDriver, content: NDArray[np.uint8], source: int) -> None:
    """From the device into ``content``; blocks."""
    _copy_now(driver, content.ctypes.data, source, content.nbytes)


def copy_from_host(driver: CudaDriver, target: int, content: NDArray[np.uint8]) -> None:
    """``content``, contiguous, to the device; blocks."""
    _copy_now(driver, target, content.ctypes.data, content.nbytes)


def _copy_now(driver: CudaDriver, target: int, source: int, nbytes: int) -> None:
    stream = driver.create_stream()
    driver.copy(target, source, nbytes, stream)
    driver.synchronize(stream)
    driver.destroy_stream(stream)
