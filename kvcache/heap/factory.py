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

from microserve.kvcache.heap.doors.host import HostHeap, HostView, Opening
from microserve.kvcache.heap.gpu.cuda_driver import LibCuda
from microserve.kvcache.heap.gpu.cuda_ipc import CudaIpcHeap
from microserve.kvcache.heap.gpu.device import BlockPut
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.heap.memfd import MayTake
from microserve.kvcache.layout import KvLayout
from microserve.protocol import log
from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.kv.grant import HeapAddress
from microserve.protocol.settings.settings import Settings

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
            heap = HostHeap(
                layout,
                incarnation=incarnation,
                num_slots=num_slots,
                may_take=may_take,
                opening=_opening(settings),
            )
            return heap, heap.data
        import torch  # an engine on a CPU does without

        device = torch.device(settings.engine.device)
        driver, block_put = LibCuda(device.index or 0), choose_put(device)
        device_heap = CudaIpcHeap(
            layout, incarnation=incarnation, driver=driver, num_slots=num_slots, block_put=block_put
        )
    except ConfigError as error:
        raise _by_setting(error) from error
    return device_heap, torch.as_tensor(device_heap.data, device=device)


def view_heap(settings: Settings, address: HeapAddress, layout: KvLayout) -> Heap:
    """The view of a heap whose owner is another process of this engine; the doors that the settings ask for
    are this one's. Raises :class:`ConfigError` for a door that cannot be opened, :class:`TransferFailed`
    without the heap."""
    try:
        return HostView(address, layout, _opening(settings))
    except ConfigError as error:
        raise _by_setting(error) from error


def _opening(settings: Settings) -> Opening:
    cache = settings.kvcache
    host, _, port = cache.door_address.removeprefix("tcp://").rpartition(":")
    return Opening(cache.doors, host.strip("[]"), int(port), cache.door_silence_s, cache.share_memory)


def _by_setting(error: ConfigError) -> ConfigError:
    """Heaps, doors and drivers name what is wrong by their own parameters; people by settings."""
    if error.field not in ("num_blocks", "heap", "device", "doors", "door_address"):
        return error
    path = f"{'engine' if error.field == 'device' else 'kvcache'}.{error.field}"
    return ConfigError(f"{path}: {error.detail}", field=path)


def choose_put(device: torch.device) -> BlockPut | None:
    """One launch for many runs of blocks, where this machine has the kernel; None: driver copies."""
    from microserve.kernels.scatter.kv_scatter import missing_kernel
    from microserve.kvcache.heap.gpu.kernel_put import KernelPut

    detail = missing_kernel(device)
    if detail is None:
        return KernelPut(device)
    _logger.warning(log.KERNEL_MISSING, kernel="block_put", instead="driver copies", detail=detail)
    return None
