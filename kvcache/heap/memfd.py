"""The file that a heap's owner shares on one host: who it is, its words, and who holds what.

A memfd: it has no name, so nothing is left behind whoever is killed, and it can neither shrink nor grow
under a peer (sealed). Peers of the same user open ``/proc/<pid>/fd/<fd>``.

    page 0        magic, length of the header, the header in msgpack: who, and how large
    words         words.py, from a page boundary
    tail          from a page boundary: the heap's data (shm.py), which gets its memory as it is used, or
                  words about its lanes (gpu/cuda_ipc.py)

Liveness and lanes are byte locks on the memfd (``F_OFD_SETLK``), of no relation to its bytes:

    byte 0                           the owner's, for its life
    byte 1 + slot * MAX_LANES + lane the lane's holder's
    byte 2**40                       shared by all who have imported memory that the file does not hold

Such a lock belongs to an open file description. The kernel drops it when the last descriptor *and* the
last mapping of that description are gone, so a free lock proves that nobody can write through this file
any more: dead with all its threads, not merely unreachable, and never so for a stopped process. A process
that forks without exec shares its locks with the child; engines do not.

Taking a lock and asking for it by taking it are system calls that order memory: what one side stored
before it let go is visible to the other side after.

Owns the file's form and its locks. Does not know what the words mean, nor where the data is.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import struct
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Final, Self

import msgspec

from microserve.kvcache.heap.mapped import require_same_kv
from microserve.kvcache.layout import KvLayout
from microserve.kvcache.words import WORD_NBYTES, WordLayout
from microserve.protocol.errors import ConfigError, TransferFailed
from microserve.protocol.messages.kv.grant import MAX_LANES, HeapAddress

HEAP_NAME: Final = "microserve-kv"
_MAGIC: Final = b"MSERVKV1"
_PREFIX: Final = struct.Struct("<8sQ")
_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, len, pid
_POPULATE_WRITE: Final = 23
"""``MADV_POPULATE_WRITE`` of Linux 5.14, which this Python has no name for."""

MayTake = Callable[[int], None]
"""Asked before so many bytes are taken; raises :class:`ConfigError` if they had better not be."""

OWNER: Final = 0
IMPORTERS: Final = 1 << 40
"""Bytes that are locked."""


class Header(msgspec.Struct, array_like=True):
    incarnation: int
    num_slots: int
    words_offset: int
    tail_offset: int
    tail_nbytes: int
    nbytes: int
    layout: KvLayout
    kind: str
    pid_namespace: str
    """Processes of another one may know the same pid as somebody else."""
    device_handle: bytes
    """What opens the data in device memory, if it is there."""


class HeapFile:
    """One process's view of such a file. Closing it drops all locks that were taken through it."""

    def __init__(self, fd: int, mapping: mmap.mmap, header: Header) -> None:
        self.fd = fd
        self.header = header
        self.words = WordLayout(header.num_slots, header.layout.num_layers, header.layout.num_blocks)
        self._map = mapping
        view = memoryview(mapping)
        end = header.words_offset + self.words.num_words * WORD_NBYTES
        self.word_region = view[header.words_offset : end]
        self.tail = view[header.tail_offset : header.tail_offset + header.tail_nbytes]
        self.shared = view[header.words_offset :]
        """All but the header, whole pages: what a device may be given to write to."""

    @classmethod
    def create(
        cls,
        kind: str,
        layout: KvLayout,
        *,
        incarnation: int,
        num_slots: int,
        tail_nbytes: int,
        device_handle: bytes = b"",
        tail_has_memory: bool = True,
    ) -> Self:
        """``tail_has_memory``: False where :meth:`back` gives it.

        :class:`ConfigError` on a machine that is not x86-64 Linux, or without the memory for it.
        """
        if sys.platform != "linux" or platform.machine() != "x86_64":
            raise ConfigError(
                f"{kind} heaps rely on x86-64 Linux, not {platform.machine()} {sys.platform}", field="heap"
            )
        words = WordLayout(num_slots, layout.num_layers, layout.num_blocks)
        words_offset = mmap.PAGESIZE
        tail_offset = _page_up(words_offset + words.num_words * WORD_NBYTES)
        nbytes = _page_up(tail_offset + tail_nbytes)
        header = Header(
            incarnation=incarnation,
            num_slots=num_slots,
            words_offset=words_offset,
            tail_offset=tail_offset,
            tail_nbytes=tail_nbytes,
            nbytes=nbytes,
            layout=layout,
            kind=kind,
            pid_namespace=_pid_namespace(),
            device_handle=device_handle,
        )
        packed = msgspec.msgpack.encode(header)
        if _PREFIX.size + len(packed) > mmap.PAGESIZE:
            raise ConfigError("the model's name does not fit into a heap's header", field="model")
        fd = os.memfd_create(HEAP_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # ftruncate would succeed without memory, and the first touch would be SIGBUS.
            os.posix_fallocate(fd, 0, nbytes if tail_has_memory else tail_offset)
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            mapping = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED)
        except OSError as error:
            os.close(fd)  # with what it has: nobody else has it
            raise ConfigError(
                f"cannot share a heap of {nbytes} bytes: {error}", field="num_blocks"
            ) from error
        mapping[: _PREFIX.size + len(packed)] = _PREFIX.pack(_MAGIC, len(packed)) + packed
        file = cls(fd, mapping, header)
        file.lock(OWNER)
        return file

    @classmethod
    def open(cls, address: HeapAddress, kind: str, mine: KvLayout) -> Self:
        """A peer's file. :class:`TransferFailed` if its owner is gone or another one, if it is out of reach
        from here, or if its KV is laid out differently."""
        if address.kind != kind or address.host != boot_id():
            raise TransferFailed(
                f"a {address.kind} heap on host {address.host} is out of reach of {kind} on host {boot_id()}"
            )
        with ExitStack() as undo:
            fd = _open(address)
            undo.callback(os.close, fd)
            header = _read_header(fd, address, kind)
            require_same_kv(mine, header.layout)
            if not _is_locked(fd, OWNER):
                raise TransferFailed(f"the owner {address.incarnation:#x} is gone")
            try:
                mapping = mmap.mmap(fd, header.nbytes, flags=mmap.MAP_SHARED)
            except OSError as error:
                raise TransferFailed(f"cannot map {header.nbytes} bytes of a peer: {error}") from error
            undo.pop_all()
        return cls(fd, mapping, header)

    @property
    def address(self) -> HeapAddress:
        """The owner's, of its own file."""
        header = self.header
        return HeapAddress(header.kind, boot_id(), os.getpid(), self.fd, header.nbytes, header.incarnation)

    def back(self, start: int, nbytes: int) -> None:
        """Memory for a part of the tail, zero at first; none that it has is changed. Raises ``OSError`` where
        there is none."""
        start += self.header.tail_offset
        os.posix_fallocate(self.fd, start, nbytes)
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        with suppress(OSError):  # an older kernel: our first writes map the pages one by one
            self._map.madvise(_POPULATE_WRITE, first, _page_up(start + nbytes) - first)

    def lock(self, byte: int) -> bool:
        """Take a byte for ourselves; False if another description has it. Again is no error."""
        return _lock(self.fd, byte, fcntl.F_WRLCK)

    def share(self, byte: int) -> bool:
        """Take a byte together with all others who share it; False if somebody has it alone."""
        return _lock(self.fd, byte, fcntl.F_RDLCK)

    def unlock(self, byte: int) -> None:
        fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0))

    def is_locked(self, byte: int) -> bool:
        """Whether another description has the byte, alone or shared; takes nothing."""
        return _is_locked(self.fd, byte)

    def close(self) -> None:
        """Drop our own views. Others may hold views of the tail; the mapping then goes with the last."""
        os.close(self.fd)
        self.word_region = self.tail = self.shared = memoryview(b"")
        with suppress(BufferError):
            self._map.close()


def lane_byte(slot: int, lane: int) -> int:
    return 1 + slot * MAX_LANES + lane


@cache
def boot_id() -> str:
    """The kernel's; two processes with the same one share a kernel. Read once: later there may be no
    descriptor."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _page_up(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


@cache
def _pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def _open(address: HeapAddress) -> int:
    path = f"/proc/{address.pid}/fd/{address.fd}"
    try:
        # The number may name something else by now, and opening a device or a FIFO can do things.
        if not os.readlink(path).startswith(f"/memfd:{HEAP_NAME} "):
            raise TransferFailed(f"{path} is not a heap: its owner is gone")
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise TransferFailed(f"{path} does not exist: its owner is gone") from error
    except OSError as error:
        raise TransferFailed(f"{path} cannot be opened (another user's?): {error}") from error


def _read_header(fd: int, address: HeapAddress, kind: str) -> Header:
    page = os.pread(fd, mmap.PAGESIZE, 0)
    if not page.startswith(_MAGIC):
        raise TransferFailed("not a heap of this version")
    _, length = _PREFIX.unpack_from(page)
    try:
        header = msgspec.msgpack.decode(page[_PREFIX.size : _PREFIX.size + length], type=Header)
    except (msgspec.MsgspecError, ConfigError) as error:
        raise TransferFailed(f"the heap's header does not decode: {error}") from error
    if header.incarnation != address.incarnation:
        raise TransferFailed(
            f"the heap is {header.incarnation:#x}, not {address.incarnation:#x}: its owner was replaced"
        )
    if header.kind != kind or header.pid_namespace != _pid_namespace():
        raise TransferFailed(f"a {header.kind} heap of {header.pid_namespace} is out of reach")
    if os.fstat(fd).st_size != header.nbytes:
        raise TransferFailed(f"the heap has {os.fstat(fd).st_size} bytes, its header says {header.nbytes}")
    return header


def _lock(fd: int, byte: int, how: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(how, os.SEEK_SET, byte, 1, 0))
    except BlockingIOError:
        return False
    return True


def _is_locked(fd: int, byte: int) -> bool:
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    (kind, *_) = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
    return bool(kind != fcntl.F_UNLCK)
