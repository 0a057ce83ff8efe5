"""What lies in an engine's heap: the bytes of a grant's blocks, read from beside.

A grant says where its heap is. One in shared memory of this kernel is opened as its peers open it. Of one
that says its doors alone, maybe on a host of its own, the file is looked for among those that the engine's
processes have open. Others (of a GPU, of another user) cannot be read, and a test that wants bytes has
nothing to look at.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from io import FileIO
from pathlib import Path

import msgspec

from microserve.kvcache.heap.memfd import _PREFIX, HEAP_NAME, Header
from microserve.kvcache.heap.shm import KIND, ShmView
from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import TransferFailed
from microserve.protocol.messages.engine_info import EngineInfo
from microserve.protocol.messages.kv.grant import Grant
from tests.support.engine_conformance.engine_process import EngineProcess

Read = Callable[[int, int], bytes]
"""Bytes of the data region: where they start, and how many."""


def layout_of(info: EngineInfo) -> KvLayout:
    """As its hello has it, but for the size of the pool, which a heap says itself."""
    geometry = info.geometry
    return KvLayout(
        model=info.model,
        num_layers=geometry.num_layers,
        num_blocks=info.num_blocks,
        block_size=geometry.block_size,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        dtype=geometry.dtype,
        revision=info.revision,
        order=geometry.order,
        rope=geometry.rope,
    )


def kv_of(
    engine: EngineProcess, info: EngineInfo, grant: Grant, blocks: Sequence[int]
) -> list[list[bytes]] | None:
    """Of these blocks in every layer: ``[layer][block]``. None where this process cannot look."""
    with _as_a_peer(info, grant) if grant.heap.kind == KIND else _behind_doors(engine, grant) as opened:
        if opened is None:
            return None
        layout, read = opened
        return [
            [
                read(layer * layout.layer_nbytes + block * layout.block_nbytes, layout.block_nbytes)
                for block in blocks
            ]
            for layer in range(layout.num_layers)
        ]


@contextmanager
def _as_a_peer(info: EngineInfo, grant: Grant) -> Iterator[tuple[KvLayout, Read] | None]:
    try:
        view = ShmView.open(grant.heap, layout_of(info))
    except TransferFailed:
        yield None
        return
    try:
        yield view.layout, lambda start, nbytes: bytes(view.read_data(start, nbytes))
    finally:
        view.close()


@contextmanager
def _behind_doors(engine: EngineProcess, grant: Grant) -> Iterator[tuple[KvLayout, Read] | None]:
    """Of this life of it."""
    for path in _heaps(engine):
        with path.open("rb", buffering=0) as file:
            header = _header_of(file)
            if header.kind == KIND and header.incarnation == grant.incarnation:
                yield header.layout, partial(_read, file, header.tail_offset)
                return
    yield None


def _header_of(file: FileIO) -> Header:
    _, length = _PREFIX.unpack(file.read(_PREFIX.size))
    return msgspec.msgpack.decode(file.read(length), type=Header)


def _read(file: FileIO, offset: int, start: int, nbytes: int) -> bytes:
    return os.pread(file.fileno(), nbytes, offset + start)


def _heaps(engine: EngineProcess) -> Iterator[Path]:
    """Files of the engine's processes that are one."""
    for pid in engine.family():
        with suppress(OSError):  # another user's, or gone
            for path in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    if os.readlink(path).startswith(f"/memfd:{HEAP_NAME} "):
                        yield path
