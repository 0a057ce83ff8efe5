"""A CUDA driver without a GPU: device memory is host memory, and streams do their work later.

Every address that the driver gives differs from the host's own by a tag, and an address outside of what it
gave is an error, so code that takes one for the other does not get away with it. An operation of a stream
runs when somebody calls ``step`` (by hand: the order of streams is the test's choice), when the stream is
synchronised, or, ``threaded``, on another thread. A copy takes two steps, so others see half of it.

Device memory is a memfd, so another process can open it as with an IPC handle, and memory that its owner
frees while others have it open turns into ``FREED_BYTE`` under them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from microserve.kvcache.heap.gpu.cuda_driver import HANDLE_NBYTES
from microserve.protocol.errors import InternalError, TransferFailed

FREED_BYTE = 0xDD
TIMEOUT_S = 30.0

_DEVICE, _REGISTERED = 1 << 56, 1 << 57
_HANDLE = struct.Struct("<QQQ")
_NAME = "microserve-device"


class Operation(NamedTuple):
    run: Callable[[], bool]
    """False: not yet, and nothing was done."""
    writes: bool


@dataclass
class _Memory:
    view: NDArray[np.uint8]
    mapping: mmap.mmap
    fd: int

    def __post_init__(self) -> None:
        # Symmetric memory is never given back; its driver goes in the end.
        self.close_fd = weakref.finalize(self, os.close, self.fd)


@dataclass
class _Stream:
    operations: deque[Operation] = field(default_factory=deque)


class HostDriver:
    def __init__(self, *, threaded: bool = False) -> None:
        self._is_threaded = threaded
        self._changed = threading.Condition(threading.RLock())
        self._worker: threading.Thread | None = None
        self._memories: dict[int, _Memory] = {}
        """By tagged address: ours and what is open here."""
        self._registered: dict[int, int] = {}
        """Tagged address -> bytes."""
        self._streams: dict[int, _Stream] = {}
        self._events: dict[int, bool] = {}
        self._next = 1

    # --- memory

    def allocate(self, nbytes: int) -> int:
        fd = os.memfd_create(_NAME, os.MFD_CLOEXEC)
        os.posix_fallocate(fd, 0, nbytes)
        return self._map(fd, nbytes)

    def clear(self, address: int, nbytes: int) -> None:
        ctypes.memset(self._host(address, nbytes), 0, nbytes)

    def free(self, address: int) -> None:
        self._memories[address].view[:] = FREED_BYTE
        self.close(address)

    def export(self, address: int) -> bytes:
        memory = self._memories[address]
        return _HANDLE.pack(os.getpid(), memory.fd, memory.view.nbytes).ljust(HANDLE_NBYTES, b"\0")

    def open(self, handle: bytes) -> int:
        pid, fd, nbytes = _HANDLE.unpack_from(handle)
        path = f"/proc/{pid}/fd/{fd}"
        try:
            if not os.readlink(path).startswith(f"/memfd:{_NAME} "):
                raise TransferFailed("the handle names something else")
            return self._map(os.open(path, os.O_RDWR | os.O_CLOEXEC), nbytes)
        except OSError as error:
            raise TransferFailed(f"a peer's device memory cannot be opened: {error}") from error

    def close(self, address: int) -> None:
        with self._changed:
            memory = self._memories.pop(address)
            memory.view = np.empty(0, np.uint8)
            memory.mapping.close()
            memory.close_fd()

    def register_host(self, address: int, nbytes: int) -> int:
        if address % mmap.PAGESIZE or nbytes % mmap.PAGESIZE:
            raise InternalError(f"{address:#x} + {nbytes} is not whole pages")
        self._registered[_REGISTERED + address] = nbytes
        return _REGISTERED + address

    def unregister_host(self, address: int) -> None:
        del self._registered[_REGISTERED + address]

    # --- streams

    def create_stream(self) -> int:
        number = self._number()
        self._streams[number] = _Stream()
        return number

    def destroy_stream(self, stream: int) -> None:
        if self._streams[stream].operations:
            raise InternalError("a stream with work in it is destroyed")
        del self._streams[stream]

    def synchronize(self, stream: int | None) -> None:
        wanted = [self._streams[stream]] if stream is not None else list(self._streams.values())
        with self._changed:
            while any(one.operations for one in wanted):
                if self._is_threaded:
                    if not self._changed.wait(TIMEOUT_S):
                        raise InternalError("a stream is stuck")
                elif not self.step_any():
                    raise InternalError("a stream is stuck")

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        half = nbytes // 2
        for at, part in ((0, half), (half, nbytes - half)):
            to, since = self._host(target + at, part), self._host(source + at, part)
            self._enqueue(stream, partial(_move, to, since, part), writes=True)

    def write_values(self, addresses: Sequence[int], value: int, stream: int) -> None:
        for address in addresses:
            word = ctypes.c_uint64.from_address(self._host(address, 8))
            self._enqueue(stream, partial(_store, word, value), writes=True)

    def wait_value(self, address: int, value: int, stream: int) -> None:
        word = ctypes.c_uint64.from_address(self._host(address, 8))
        self._enqueue(stream, lambda: ctypes.c_int64(word.value - value).value >= 0)

    def record(self, stream: int) -> int:
        number = self._number()
        self._events[number] = False
        self._enqueue(stream, lambda: self._set_done(number))
        return number

    def wait_event(self, stream: int, event: int) -> None:
        # An event that is destroyed was waited for by all who ever will.
        self._enqueue(stream, lambda: self._events[event])

    def is_done(self, event: int) -> bool:
        return self._events[event]

    def destroy_event(self, event: int) -> None:
        """Kept: streams may wait for it yet, as the driver allows."""

    # --- for tests

    def launch(self, stream: int, kernel: Callable[[], None]) -> None:
        """Enqueue work of the test's own."""

        def run() -> bool:
            kernel()
            return True

        self._enqueue(stream, run, writes=True)

    def host_view(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        """Device memory as its kernels see it; not after it is freed."""
        # From an address: a view of the mapping itself would keep it from being closed.
        memory = (ctypes.c_uint8 * nbytes).from_address(self._host(address, nbytes))
        return np.frombuffer(memoryview(memory), np.uint8)

    @property
    def busy_streams(self) -> list[int]:
        return [number for number, stream in self._streams.items() if stream.operations]

    @property
    def is_writing(self) -> bool:
        """Some stream has a copy or a store yet to do."""
        return any(operation.writes for stream in self._streams.values() for operation in stream.operations)

    def step(self, stream: int) -> bool:
        """Run one operation of a stream; False if it has none, or waits."""
        with self._changed:
            operations = self._streams[stream].operations
            if not operations or not operations[0].run():
                return False
            operations.popleft()
            self._changed.notify_all()
            return True

    def step_any(self) -> bool:
        return any(self.step(stream) for stream in self.busy_streams)

    # --- inside

    def _number(self) -> int:
        self._next += 1
        return self._next

    def _map(self, fd: int, nbytes: int) -> int:
        mapping = mmap.mmap(fd, nbytes)
        view = np.frombuffer(mapping, np.uint8)
        address = int(view.ctypes.data) + _DEVICE
        self._memories[address] = _Memory(view, mapping, fd)
        return address

    def _host(self, address: int, nbytes: int) -> int:
        """The host's address of what a device may reach, or of plain host memory."""
        if address >= _REGISTERED:
            if any(
                start <= address and address + nbytes <= start + n for start, n in self._registered.items()
            ):
                return address - _REGISTERED
        elif address >= _DEVICE:
            for start, memory in self._memories.items():
                if start <= address and address + nbytes <= start + memory.view.nbytes:
                    return address - _DEVICE
        else:
            return address
        raise InternalError(f"illegal address: {nbytes} bytes at {address:#x}")

    def _set_done(self, event: int) -> bool:
        self._events[event] = True
        return True

    def _enqueue(self, stream: int, run: Callable[[], bool], *, writes: bool = False) -> None:
        with self._changed:
            self._streams[stream].operations.append(Operation(run, writes))
            if self._is_threaded and (self._worker is None or not self._worker.is_alive()):
                self._worker = threading.Thread(target=self._work, daemon=True)
                self._worker.start()

    def _work(self) -> None:
        """Ends when there is nothing to do, so that no thread outlives a test."""
        while True:
            with self._changed:
                if not self.busy_streams:
                    self._worker = None
                    return
                if not self.step_any():
                    # A value that another process writes wakes nobody.
                    self._changed.wait(0.001)


def host_address(address: int) -> int:
    """Of an address that a HostDriver gave, where the host finds it."""
    return address & ~(_DEVICE | _REGISTERED)


def _move(target: int, source: int, nbytes: int) -> bool:
    ctypes.memmove(target, source, nbytes)
    return True


def _store(word: ctypes.c_uint64, value: int) -> bool:
    word.value = value
    return True
