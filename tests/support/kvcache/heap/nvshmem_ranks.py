"""Heaps of a world that is inside one process, and a rank that lets a test in between two of its calls."""

from __future__ import annotations

from collections.abc import Callable

from microserve.kvcache.heap.gpu.device import BlockPut
from microserve.kvcache.heap.gpu.nvshmem import NvshmemHeap
from microserve.kvcache.layout import KvLayout
from tests.support.engine.device.host_driver import HostDriver
from tests.support.engine.device.host_world import HostRank, HostWorld
from tests.support.kvcache.kv_samples import make_layout

CAPACITY = 1 << 16


class Rank(HostRank):
    """Calls ``between`` after each wait for its own words to be there."""

    between: Callable[[], None] | None = None

    def quiet(self, stream: int) -> None:
        super().quiet(stream)
        self._driver.synchronize(stream)
        between, self.between = self.between, None
        if between is not None:
            between()


def make_heap(
    world: HostWorld,
    incarnation: int,
    *,
    heap: type[NvshmemHeap] = NvshmemHeap,
    driver: HostDriver | None = None,
    layout: KvLayout | None = None,
    num_slots: int = 2,
    block_put: BlockPut | None = None,
) -> NvshmemHeap:
    driver = driver or HostDriver()
    return heap(
        layout or make_layout(),
        incarnation=incarnation,
        world=Rank(world, len(world.handles), driver),
        driver=driver,
        capacity_nbytes=CAPACITY,
        num_slots=num_slots,
        block_put=block_put,
    )
