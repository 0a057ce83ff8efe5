"""One engine of a world, in a process of its own: ``python -m tests.support.engine.world_child MODE FOLDER
SETTING...``; through the real runner of services, without a model.

    serve     joins, says so, and looks for deaths until it is stopped
    hold      the same, and holds a lane of rank 0
    stuck     the library never comes back
    deaf      the same, and lets no other Python thread run
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import threading
from pathlib import Path

import msgspec
import structlog

from microserve.kvcache.heap.gpu.cuda_driver import CudaDriver
from microserve.kvcache.heap.gpu.nvshmem import NvshmemHeap
from microserve.kvcache.heap.gpu.nvshmem_world import UNIQUE_ID_NBYTES, SymmetricMemory
from microserve.kvcache.heap.heap import PeerHeap
from microserve.kvcache.words import OPEN, pack_state
from microserve.protocol.bus.transport import Bus
from microserve.protocol.logging import setup as logging
from microserve.protocol.messages.kv.grant import HeapAddress
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.process.run import run_service
from microserve.protocol.settings.settings import Settings
from microserve.protocol.settings.sources import load_settings
from microserve.services.engine.world import Library, join_world
from tests.support.engine.device.host_driver import HostDriver
from tests.support.index.folder_world import FolderRank, fetch, publish
from tests.support.kvcache.kv_samples import make_layout

LOOK_S = 0.01
FOREVER_S = 1000
_logger = structlog.get_logger()


class StandIn:
    """What takes the library's place; the driver's streams run on a thread."""

    def __init__(self, mode: str, folder: Path) -> None:
        self._mode = mode
        self._folder = folder
        self._driver = HostDriver(threaded=True)

    def make_library(self) -> Library:
        return Library(
            lambda: b"capability".ljust(UNIQUE_ID_NBYTES, b"!"), self._make_world, self._make_driver
        )

    def _make_driver(self, device: int) -> CudaDriver:
        return self._driver

    def _make_world(
        self, unique_id: bytes, *, rank: int, num_ranks: int, device: int, symmetric_nbytes: int
    ) -> SymmetricMemory:
        _logger.info("test.joining")
        lines = logging.current()
        assert lines is not None and lines.flush()
        if self._mode == "stuck":
            threading.Event().wait()
        if self._mode == "deaf":
            ctypes.PyDLL(None).sleep(FOREVER_S)  # PyDLL: with the interpreter's lock in its hands
        return FolderRank(self._folder, unique_id, rank, num_ranks, self._driver)


async def serve(settings: Settings, bus: Bus, lifecycle: Lifecycle, mode: str, folder: Path) -> None:
    stand_in = StandIn(mode, folder)
    world = await join_world(
        settings, bus, lifecycle, make_layout(), os.getpid(), device=0, library=stand_in.make_library()
    )
    publish(folder / f"address{settings.nvshmem.rank}", msgspec.json.encode(world.heap.address))
    peer: PeerHeap | None = None
    if mode == "hold":
        peer = world.heap.attach(msgspec.json.decode(fetch(folder / "address0"), type=HeapAddress))
        assert peer.hold(0, 1)
    lock = threading.Lock()
    if mode == "serve":
        world.heap.store(world.heap.words.state(0), pack_state(1, OPEN))
    lifecycle.ready(f"rank {settings.nvshmem.rank}")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(world.watch(lock))
        tasks.create_task(tell_when_held(world.heap, lock))
    if peer is not None:
        peer.close()


async def tell_when_held(heap: NvshmemHeap, lock: threading.Lock) -> None:
    """A line for each change of who holds our lane."""
    was_held: bool | None = None
    while True:
        with lock:
            heap.poll(wait=True)
            is_held = heap.is_held(0, 1)
        if is_held != was_held:
            was_held = is_held
            _logger.info("test.lane", is_held=is_held)
        await asyncio.sleep(LOOK_S)


def main() -> int:
    mode, folder, *overrides = sys.argv[1:]

    async def run(settings: Settings, bus: Bus, lifecycle: Lifecycle) -> None:
        await serve(settings, bus, lifecycle, mode, Path(folder))

    code = run_service("engine", load_settings(overrides=overrides), lambda: run)
    print("exit handlers", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
