"""Two engine cores on heaps of one NVSHMEM world; owners see their words by a mirror that comes late."""

from __future__ import annotations

from microserve.kvcache.heap.gpu.nvshmem import NvshmemHeap
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.layout import KvLayout
from microserve.services.engine.core.batch import Runner
from tests.support.engine.device.device_mesh import DeviceMesh, StreamRunner
from tests.support.engine.device.host_driver import HostDriver
from tests.support.engine.device.host_world import HostWorld

CAPACITY_NBYTES = 1 << 18
IDLE_ROUNDS = 4
"""Looks at an up-to-date mirror without anything to do: a store of the last one shows in the next."""


class WorldMesh(DeviceMesh):
    def __init__(self, *, seed: int = 0, **options: int) -> None:
        self.world = HostWorld(num_ranks=2)
        super().__init__(seed=seed, **options)

    def equip(self, layout: KvLayout, incarnation: int, num_slots: int) -> tuple[Heap, Runner, int | None]:
        driver = HostDriver()
        heap = NvshmemHeap(
            layout,
            incarnation=incarnation,
            world=self.world.join(driver),
            driver=driver,
            capacity_nbytes=CAPACITY_NBYTES,
            num_slots=num_slots,
        )
        runner = StreamRunner(heap, driver, self.drift)
        self.drivers.append(driver)
        return heap, runner, runner.stream if self.follows else None

    def run(self, limit: int = 4000) -> None:
        """Step both until neither can, though each has seen all that there is."""
        num_idle = 0
        for _ in range(limit):
            self.now += 0.001
            self.drift()
            if self.a.step() | self.b.step():
                num_idle = 0
                continue
            num_idle += 1
            if num_idle > IDLE_ROUNDS:
                return
            for engine in (self.a, self.b):
                engine.heap.poll(wait=True)
            for driver in self.drivers:
                driver.synchronize(None)
        raise AssertionError("the mesh does not come to rest")
