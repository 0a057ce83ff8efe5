"""The front door of the heaps: one engine's own heap, of the kind that its settings ask for.

Owns the choice among the kinds, what a heap on this machine puts with, and the setting that a refusal is said
by. Does not know the engine. ``nvshmem`` is not made here: nobody makes such a heap alone (engine/world.py),
and ``local.py`` is for tests and the simulation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import structlog

from microserve.kvcache.heap.cuda_driver import LibCuda
from microserve.kvcache.heap.cuda_ipc import CudaIpcHeap
from microserve.kvcache.heap.device import BlockPut
from microserve.kvcache.heap.doors.host import HostHeap
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.heap.memfd import MayTake
from microserve.kvcache.layout import KvLayout
from microserve.protocol import log
from microserve.protocol.errors import ConfigError
from microserve.protocol.settings import Settings

if TYPE_CHECKING:
    import torch

_logger = structlog.get_logger()

HeapData: TypeAlias = "npt.NDArray[np.uint8] | torch.Tensor"
"""The data region of a heap, as a model computes on it."""


def make_heap(
    settings: Settings, layout: KvLayout, incarnation: int, may_take: MayTake = lambda nbytes: None
) -> tuple[Heap, HeapData]:
    """The heap of ``kvcache.heap``, ``shm`` or ``cuda_ipc``, and its data region. ``may_take`` is asked
    before each part of the host's memory.

    Raises :class:`ConfigError` if it cannot be had: no such device, too little memory.
    """
    num_slots = settings.kvcache.grant_slots
    try:
        if settings.heap == "shm":
            cache = settings.kvcache
            host, _, port = cache.door_address.removeprefix("tcp://").rpartition(":")
            heap = HostHeap(
                layout,
                incarnation=incarnation,
                num_slots=num_slots,
                may_take=may_take,
                doors=cache.doors,
                host=host.strip("[]"),
                port=int(port),
                silence_s=cache.door_silence_s,
                shares_memory=cache.share_memory,
            )
            return heap, heap.data
        import torch  # an engine on a CPU does without

        device = torch.device(settings.engine.device)
        driver, block_put = LibCuda(device.index or 0), choose_put(device)
        device_heap = CudaIpcHeap(
            layout, incarnation=incarnation, driver=driver, num_slots=num_slots, block_put=block_put
        )
    except ConfigError as error:
        # Heaps and drivers name what is wrong by their own parameters; people by settings.
        section = "engine" if error.field == "device" else "kvcache"
        is_known = error.field in ("num_blocks", "heap", "device", "doors", "door_address")
        path = f"{section}.{error.field}" if is_known else None
        if path is None:
            raise
        raise ConfigError(f"{path}: {error.detail}", field=path) from error
    return device_heap, torch.as_tensor(device_heap.data, device=device)


def choose_put(device: torch.device) -> BlockPut | None:
    """One launch for many runs of blocks, where this machine has the kernel; None: driver copies."""
    from microserve.kernels.scatter.kv_scatter import missing_kernel
    from microserve.kvcache.heap.kernel_put import KernelPut

    detail = missing_kernel(device)
    if detail is None:
        return KernelPut(device)
    _logger.warning(log.KERNEL_MISSING, kernel="block_put", instead="driver copies", detail=detail)
    return None
