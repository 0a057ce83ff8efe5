"""A packed model as a file that every engine of this machine maps: its form, and the proof that it is whole.

    pages of weights | the sum of each page | a description (msgpack) | a trailer of fixed size

The trailer has the length of the description and a SHA-256 of it and of the sums; the sum of a page is the
exclusive or of its words. Both are held against what is there whenever a file is opened, so one that was cut,
torn, or damaged on its disk is no file; reading it once costs what reading memory costs (270 MB: 10 ms), and
brings it in. Written beside its place and renamed into it, and never written again: who wants it gone removes
it, and who has it mapped keeps it. Cut short in place, it would end them. Knows no cache.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import struct
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from microserve.kernels.cpu.library import Library
from microserve.kernels.cpu.weights import LayerKind, PackedWeights, Shape, packed_nbytes
from microserve.services.engine.model.spec import ModelSpec
from microserve.services.engine.native.packed_model import PackedModel

PAGE_NBYTES = 4096
MAX_DESCRIPTION_NBYTES = 1 << 20
_MAGIC = b"mspack1\n"
_TRAILER = struct.Struct("<8sQQ32s")
"""Magic, bytes of weights, bytes of the description, digest."""
_WRITE_NBYTES = 8 << 20
"""At a time: large enough that a file system keeps large pages of it."""


class NotWhole(Exception):
    """What is there is no packed model; why, in words."""


class _Description(msgspec.Struct, frozen=True):
    spec: ModelSpec
    shape: Shape
    layers: tuple[LayerKind, ...]
    has_head: bool
    num_positions: int
    tables: str


def write(model: PackedModel, target: Path) -> None:
    """In a directory that is there. Raises ``OSError``."""
    weights = model.weights
    description = msgspec.msgpack.encode(
        _Description(
            model.spec, model.shape, weights.layers, weights.has_head, weights.num_positions, model.tables
        )
    )
    sums = _sums(weights.memory).tobytes()
    digest = hashlib.sha256(sums + description).digest()
    trailer = _TRAILER.pack(_MAGIC, weights.memory.nbytes, len(description), digest)
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=".packing-")
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:
            memory = weights.memory.data
            for part in (memory, memoryview(sums + description + trailer)):
                for begin in range(0, part.nbytes, _WRITE_NBYTES):
                    left = part[begin : begin + _WRITE_NBYTES]
                    while left.nbytes:  # a disk that is nearly full takes a part
                        left = left[file.write(left) :]
            os.fchmod(handle, 0o400)
            os.fsync(handle)
        os.rename(partial, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise


def read(path: Path, library: Library, name: str) -> PackedModel:
    """The model under the name of its directory. Its weights are the file's pages, and for as long as they
    are held the file is open: so others see that its memory is wanted.

    Raises ``OSError`` where there is none, :class:`NotWhole` for what is not one, or not to be trusted."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise NotWhole("it is no file")
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise NotWhole("another user could have written it")
        return _mapped(descriptor, status.st_size, library, name)
    finally:
        os.close(descriptor)  # the mapping has its own


def _mapped(descriptor: int, nbytes: int, library: Library, name: str) -> PackedModel:
    if nbytes < _TRAILER.size:
        raise NotWhole(f"it has {nbytes} bytes")
    trailer = os.pread(descriptor, _TRAILER.size, nbytes - _TRAILER.size)
    magic, weights_nbytes, description_nbytes, digest = _TRAILER.unpack(trailer)
    sums_nbytes = weights_nbytes // PAGE_NBYTES * 8
    if magic != _MAGIC or weights_nbytes % PAGE_NBYTES or description_nbytes > MAX_DESCRIPTION_NBYTES:
        raise NotWhole("its end is not that of a packed model")
    if weights_nbytes + sums_nbytes + description_nbytes + _TRAILER.size != nbytes or not weights_nbytes:
        raise NotWhole(f"it has {nbytes} bytes, and other ones are described")
    told = os.pread(descriptor, sums_nbytes + description_nbytes, weights_nbytes)
    if hashlib.sha256(told).digest() != digest:
        raise NotWhole("its description is damaged")
    mapped = mmap.mmap(descriptor, weights_nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    with suppress(OSError, AttributeError):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(mapped, np.uint8)
    if _sums(memory).tobytes() != told[:sums_nbytes]:
        raise NotWhole("its weights are damaged")
    try:
        found = msgspec.msgpack.decode(told[sums_nbytes:], type=_Description)
        weights = PackedWeights(memory, found.layers, found.has_head, found.num_positions)
        wanted_nbytes = packed_nbytes(library, found.shape, weights)
    except (msgspec.MsgspecError, ValueError) as error:
        raise NotWhole(f"it is described as what is none: {error}") from None
    if wanted_nbytes != weights_nbytes:
        raise NotWhole(f"its weights are {weights_nbytes} bytes, and have to be {wanted_nbytes}")
    return PackedModel(replace(found.spec, name=name), found.shape, weights, found.tables)


def _sums(memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    pages = memory.view(np.uint64).reshape(-1, PAGE_NBYTES // 8)
    return np.asarray(np.bitwise_xor.reduce(pages, axis=1), np.uint64)
