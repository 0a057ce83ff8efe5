"""Puts of many runs of blocks as one launch of a kernel, instead of one driver copy a run.

    Copies ── once ──> table of ranges on the device ── layer by layer ──> block_put between shifted places

A prompt of 3,000 tokens in scattered blocks is 188 runs a layer, and a driver copy of each costs the step's
thread a call. The kernel takes few thread blocks, so that what computes beside it keeps the multiprocessors.

Owns the tables and the launch. Knows neither heaps nor who may write where (device.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final
from weakref import WeakKeyDictionary

import torch

from microserve.kernels import cuda_module
from microserve.kernels.cuda_module import Launch
from microserve.kernels.scatter.block_put import PutPlan, put_launch, put_plan
from microserve.kvcache.heap.heap import Copies

MAX_THREAD_BLOCKS: Final = 32
"""At most a quarter of an H100's multiprocessors, for any length of put. To be measured."""


class KernelPut:
    """A ``device.BlockPut``. For one thread."""

    def __init__(self, device: torch.device, *, enqueue: Callable[[Launch, int], None] | None = None) -> None:
        """Builds and loads the kernels of a CUDA device; ``enqueue(launch, stream)`` for streams that are not
        CUDA's. Raises :class:`~microserve.kernels.cuda_module.KernelUnavailable`."""
        if device.type == "cuda":
            cuda_module.load(device)
        self._device = device
        self._enqueue = enqueue or self._launch
        self._tables: WeakKeyDictionary[Copies, dict[int, PutPlan]] = WeakKeyDictionary()
        """By stream: a table is there for whatever its own stream does after its upload."""

    def __call__(self, copies: Copies, source: int, target: int, stream: int) -> bool:
        with self._on(stream):
            tables = self._tables.setdefault(copies, {})
            table = tables.get(stream)
            if table is None:
                ranges = [copy for copy in copies.copies if copy.nbytes]
                try:
                    table = tables[stream] = put_plan(ranges, self._device)
                except torch.OutOfMemoryError:  # a stream's first table takes megabytes, as torch allocates
                    return False
            if table.num_ranges:
                launch = put_launch(source, target, table, 1, (0, 0), None, MAX_THREAD_BLOCKS)
                self._enqueue(launch, stream)
        return True

    def _launch(self, launch: Launch, stream: int) -> None:
        launch.enqueue(self._device)

    @contextmanager
    def _on(self, stream: int) -> Iterator[None]:
        if self._device.type != "cuda":
            yield
            return
        # Memory that torch allocates in here, the tables, is used again in this stream's order only.
        with (
            torch.cuda.device(self._device),
            torch.cuda.stream(torch.cuda.ExternalStream(stream, device=self._device)),  # type: ignore[no-untyped-call]
        ):
            yield
