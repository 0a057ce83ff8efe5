"""Heaps in shared memory, for engines of one user on one Linux host.

A memfd: it has no name, so nothing is left behind whoever is killed, and it can neither shrink nor grow
under a peer (sealed). Peers of the same user open ``/proc/<pid>/fd/<fd>``.

    page 0        magic, length of the header, the header in msgpack: who, and how large
    words         words.py, from a page boundary
    data          layout.py, from a page boundary

Liveness and lanes are byte locks on the memfd (``F_OFD_SETLK``), of no relation to its bytes:

    byte 0                           the owner's, for its life
    byte 1 + slot * MAX_LANES + lane the lane's holder's

Such a lock belongs to an open file description. The kernel drops it when the last descriptor *and* the
last mapping of that description are gone, so a free lock proves that nobody can write through it any
more: dead with all its threads, not merely unreachable, and never so for a stopped process. A process
that forks without exec shares its locks with the child; engines do not.

``hold`` and ``is_held`` both acquire the lock, so what one side stored before it let go is visible to the
other side after: a writer that finds the lane free after a grant was closed reads CLOSED. No memory fence
is needed in between (x86 lets a load pass an earlier store; "store the claim, then read STATE" would need
one, and Python has none).

Signals need no fence either: x86-64 keeps the order of stores as others see it (TSO), CPython and memcpy
finish a copy before the next bytecode, string instructions are ordered before a later separate store, and
glibc ends its non-temporal copies with sfence. Other machines, such as aarch64, promise none of that: they
are refused until someone brings a store-release.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import struct
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

import msgspec

from microserve.kvcache.heap.mapped import MappedHeap, MappedPeerHeap, require_same_kv
from microserve.kvcache.layout import KvLayout
from microserve.kvcache.words import DEFAULT_NUM_SLOTS, MAX_LANES, WORD_NBYTES, WordLayout
from microserve.protocol.errors import ConfigError, TransferFailed
from microserve.protocol.grant import HeapAddress

_NAME: Final = "microserve-kv"
_MAGIC: Final = b"MSERVKV1"
_PREFIX: Final = struct.Struct("<8sQ")
_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, len, pid
_OWNER: Final = 0
_POPULATED: Final = mmap.MAP_SHARED | mmap.MAP_POPULATE


class _Header(msgspec.Struct, array_like=True):
    incarnation: int
    num_slots: int
    words_offset: int
    data_offset: int
    nbytes: int
    layout: KvLayout


class ShmHeap(MappedHeap):
    def __init__(self, layout: KvLayout, *, incarnation: int, num_slots: int = DEFAULT_NUM_SLOTS) -> None:
        """Takes and touches all of its memory now (seconds for many GiB), so that no put waits for a page.

        :class:`ConfigError` on a machine that is not x86-64 Linux, or without that much memory.
        """
        if sys.platform != "linux" or platform.machine() != "x86_64":
            raise ConfigError(
                f"shared memory heaps rely on x86-64 Linux, not {platform.machine()} {sys.platform}",
                field="heap",
            )
        words = WordLayout(num_slots, layout.num_layers, layout.num_blocks)
        words_offset = mmap.PAGESIZE
        data_offset = _page_up(words_offset + words.num_words * WORD_NBYTES)
        nbytes = _page_up(data_offset + layout.data_nbytes)
        header = msgspec.msgpack.encode(
            _Header(incarnation, num_slots, words_offset, data_offset, nbytes, layout)
        )
        if _PREFIX.size + len(header) > mmap.PAGESIZE:
            raise ConfigError("the model's name does not fit into a heap's header", field="model")
        self._is_closed = False
        self._fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # ftruncate would succeed without memory, and the first touch would be SIGBUS.
            os.posix_fallocate(self._fd, 0, nbytes)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._map = mmap.mmap(self._fd, nbytes, flags=_POPULATED)
            _lock(self._fd, _OWNER)
        except OSError as error:
            os.close(self._fd)
            raise ConfigError(
                f"cannot share a heap of {nbytes} bytes: {error}", field="num_blocks"
            ) from error
        view = memoryview(self._map)
        view[: _PREFIX.size + len(header)] = _PREFIX.pack(_MAGIC, len(header)) + header
        self._data = view[data_offset : data_offset + layout.data_nbytes]
        super().__init__(
            layout,
            words,
            HeapAddress("shm", _boot_id(), os.getpid(), self._fd, nbytes, incarnation),
            view[words_offset : words_offset + words.num_words * WORD_NBYTES],
            self._data,
        )

    def is_held(self, slot: int, lane: int) -> bool:
        byte = _lane_byte(slot, lane)
        if not _lock(self._fd, byte):
            return True
        _unlock(self._fd, byte)
        return False

    def attach(self, address: HeapAddress) -> ShmPeerHeap:
        """Touches every page of the peer's heap: about 0.1 s a GiB, once."""
        if address.kind != "shm" or address.host != self.address.host:
            raise TransferFailed(
                f"a {address.kind} heap on host {address.host} is out of reach of host {self.address.host}"
            )
        return ShmPeerHeap(self.layout, self._data, address)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        _unlock(self._fd, _OWNER)
        os.close(self._fd)
        self._drop()
        self._data = memoryview(b"")
        # Others may hold views of the data; the mapping then goes with the last of them.
        with suppress(BufferError):
            self._map.close()


class ShmPeerHeap(MappedPeerHeap):
    def __init__(self, mine: KvLayout, source: memoryview, address: HeapAddress) -> None:
        with ExitStack() as undo:
            self._fd = _open(address)
            undo.callback(os.close, self._fd)
            header = _read_header(self._fd, address)
            require_same_kv(mine, header.layout)
            if not _is_locked(self._fd, _OWNER):
                raise TransferFailed(f"the owner {address.incarnation:#x} is gone")
            try:
                self._map = mmap.mmap(self._fd, header.nbytes, flags=_POPULATED)
            except OSError as error:
                raise TransferFailed(f"cannot map {header.nbytes} bytes of a peer: {error}") from error
            undo.pop_all()
        words = WordLayout(header.num_slots, header.layout.num_layers, header.layout.num_blocks)
        view = memoryview(self._map)
        super().__init__(
            header.layout,
            words,
            address,
            view[header.words_offset : header.words_offset + words.num_words * WORD_NBYTES],
            view[header.data_offset : header.data_offset + header.layout.data_nbytes],
            source,
        )

    def hold(self, slot: int, lane: int) -> bool:
        self._require_open()
        # The kernel would let one description take its own lock again.
        if (slot, lane) in self._held or not _lock(self._fd, _lane_byte(slot, lane)):
            return False
        self._held.add((slot, lane))
        return True

    def let_go(self, slot: int, lane: int) -> None:
        self._require_open()
        if (slot, lane) in self._held:
            _unlock(self._fd, _lane_byte(slot, lane))
            self._held.remove((slot, lane))

    def owner_is_dead(self) -> bool:
        self._require_open()
        return not _is_locked(self._fd, _OWNER)

    def close(self) -> None:
        if self._detach():
            self._map.close()
            os.close(self._fd)


def _page_up(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _open(address: HeapAddress) -> int:
    path = f"/proc/{address.pid}/fd/{address.fd}"
    try:
        # The number may name something else by now, and opening a device or a FIFO can do things.
        if not os.readlink(path).startswith(f"/memfd:{_NAME} "):
            raise TransferFailed(f"{path} is not a heap: its owner is gone")
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise TransferFailed(f"{path} does not exist: its owner is gone") from error
    except OSError as error:
        raise TransferFailed(f"{path} cannot be opened (another user's?): {error}") from error


def _read_header(fd: int, address: HeapAddress) -> _Header:
    page = os.pread(fd, mmap.PAGESIZE, 0)
    if not page.startswith(_MAGIC):
        raise TransferFailed("not a heap of this version")
    _, length = _PREFIX.unpack_from(page)
    try:
        header = msgspec.msgpack.decode(page[_PREFIX.size : _PREFIX.size + length], type=_Header)
    except (msgspec.MsgspecError, ConfigError) as error:
        raise TransferFailed(f"the heap's header does not decode: {error}") from error
    if header.incarnation != address.incarnation:
        raise TransferFailed(
            f"the heap is {header.incarnation:#x}, not {address.incarnation:#x}: its owner was replaced"
        )
    if os.fstat(fd).st_size != header.nbytes:
        raise TransferFailed(f"the heap has {os.fstat(fd).st_size} bytes, its header says {header.nbytes}")
    return header


def _lane_byte(slot: int, lane: int) -> int:
    return 1 + slot * MAX_LANES + lane


def _lock(fd: int, byte: int) -> bool:
    """Take a byte for the description behind ``fd``; False if another one has it."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    except BlockingIOError:
        return False
    return True


def _unlock(fd: int, byte: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0))


def _is_locked(fd: int, byte: int) -> bool:
    """Whether another description has the byte; takes nothing."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    (kind, *_) = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
    return bool(kind != fcntl.F_UNLCK)
