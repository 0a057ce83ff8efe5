"""The heaps under test. A new heap adds a factory here, and passes the conformance suites."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.util import find_spec
from typing import ClassVar

from microserve.kvcache.heap.doors.host import HostHeap, Opening
from microserve.kvcache.heap.doors.tcp.door import TcpDoor
from microserve.kvcache.heap.gpu.cuda_driver import LibCuda
from microserve.kvcache.heap.gpu.cuda_ipc import CudaIpcHeap
from microserve.kvcache.heap.gpu.nvshmem import NvshmemHeap
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.heap.local import MemoryHeap, MemoryRegistry
from microserve.kvcache.heap.shm import ShmHeap
from microserve.kvcache.layout import KvLayout
from tests.support.engine.device.host_driver import HostDriver
from tests.support.engine.device.host_world import HostWorld

NUM_SLOTS = 3
MINE, THEIRS, OTHERS = 11, 22, 33
"""Incarnations."""


class HeapFactory(ABC):
    crosses_processes: ClassVar[bool]
    num_race_rounds: ClassVar[int] = 4000
    is_remote: ClassVar[bool] = False
    """Over a network: what became of a peer comes with the next packet, and a frozen one answers nothing."""

    @abstractmethod
    def create(self, layout: KvLayout, incarnation: int) -> Heap: ...


class MemoryFactory(HeapFactory):
    crosses_processes = False

    def __init__(self) -> None:
        self.registry = MemoryRegistry()

    def create(self, layout: KvLayout, incarnation: int) -> Heap:
        return MemoryHeap(layout, incarnation=incarnation, registry=self.registry, num_slots=NUM_SLOTS)


class ShmFactory(HeapFactory):
    crosses_processes = True

    def create(self, layout: KvLayout, incarnation: int) -> Heap:
        return ShmHeap(layout, incarnation=incarnation, num_slots=NUM_SLOTS)


class TcpFactory(HeapFactory):
    """A heap that shares no memory: all goes through its door."""

    crosses_processes = True
    num_race_rounds = 400
    is_remote = True
    kind: ClassVar[str] = "tcp"

    def create(self, layout: KvLayout, incarnation: int) -> Heap:
        host = os.environ.get(DOOR_HOST, "127.0.0.1")
        opening = Opening([self.kind], host, silence_s=60.0, shares_memory=False)
        return HostHeap(layout, incarnation=incarnation, num_slots=NUM_SLOTS, opening=opening)


def lose_patience(heap: HostHeap) -> None:
    """From now on its doors take a moment for a silence; until then a machine may be as busy as it likes."""
    for door in heap._doors:
        assert isinstance(door, TcpDoor)
        door._silence_s = 0.2
        os.eventfd_write(door._wake, 1)


class NixlFactory(TcpFactory):
    """Needs the extra ``nixl``."""

    num_race_rounds = 200
    kind = "nixl"


class CudaIpcFactory(HeapFactory):
    """Over a driver whose device memory is host memory, and whose streams run on another thread."""

    crosses_processes = True
    num_race_rounds = 300

    def create(self, layout: KvLayout, incarnation: int) -> Heap:
        driver = HostDriver(threaded=True)
        return CudaIpcHeap(layout, incarnation=incarnation, driver=driver, num_slots=NUM_SLOTS)


class NvshmemFactory(HeapFactory):
    crosses_processes = False

    def __init__(self) -> None:
        self.world = HostWorld(num_ranks=4)

    def create(self, layout: KvLayout, incarnation: int) -> Heap:
        driver = HostDriver(threaded=True)
        return NvshmemHeap(
            layout,
            incarnation=incarnation,
            world=self.world.join(driver),
            driver=driver,
            capacity_nbytes=1 << 16,
            num_slots=NUM_SLOTS,
        )


class LibCudaFactory(HeapFactory):
    """Over the driver's library, or the one that the environment names instead.

    One driver a process, as an engine has.
    """

    crosses_processes = True
    num_race_rounds = 1000

    def __init__(self) -> None:
        self._driver = LibCuda(library=os.environ.get(LIBCUDA, "libcuda.so.1"))

    def create(self, layout: KvLayout, incarnation: int) -> Heap:
        return CudaIpcHeap(layout, incarnation=incarnation, driver=self._driver, num_slots=NUM_SLOTS)


class LaunchFactory(HeapFactory):
    """On a device, with the puts of an engine on it: many runs are one launch. Needs CUDA's torch, CuPy."""

    crosses_processes = True
    num_race_rounds = 1000

    def __init__(self) -> None:
        import torch

        from microserve.kvcache.heap.gpu.kernel_put import KernelPut

        self._driver = LibCuda()
        self._put = KernelPut(torch.device("cuda", 0))

    def create(self, layout: KvLayout, incarnation: int) -> Heap:
        return CudaIpcHeap(
            layout, incarnation=incarnation, driver=self._driver, num_slots=NUM_SLOTS, block_put=self._put
        )


LIBCUDA = "MICROSERVE_TEST_LIBCUDA"
DOOR_HOST = "MICROSERVE_TEST_DOOR_HOST"
"""Where doors are; by default on loopback."""
FACTORIES: dict[str, Callable[[], HeapFactory]] = {
    "memory": MemoryFactory,
    "shm": ShmFactory,
    "tcp": TcpFactory,
    "nixl": NixlFactory,
    "cuda_ipc": CudaIpcFactory,
    "nvshmem": NvshmemFactory,
    "libcuda": LibCudaFactory,
    "libcuda_launch": LaunchFactory,
}
EVERYWHERE = ["memory", "shm", "tcp", "cuda_ipc", "nvshmem"]
"""Need nothing that a machine may lack."""
INSTALLED = [*EVERYWHERE, *(["nixl"] if find_spec("nixl") is not None else [])]
"""And what is here by an extra."""
DOORS = [name for name in INSTALLED if name in ("tcp", "nixl")]
CROSSING = [name for name in INSTALLED if FACTORIES[name]().crosses_processes]
