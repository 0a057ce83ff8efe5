"""Cached blocks from one pool into another: whole blocks and runs of rows, all layers in one launch.

Owns the checks and the shape of the launch; the kernel and its address arithmetic are in
``cuda/block_put.*``. Must not know what lies in the bytes, who owns them or how peers are mapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from microserve.kernels import cuda_module
from microserve.kernels.cuda_module import Launch
from microserve.kernels.scatter.arrival_signal import ArrivalSignal, signal_arguments

NUM_THREADS = 256
THREAD_BLOCKS_PER_MULTIPROCESSOR = 4
PIECE_NBYTES = 16384
"""As in ``cuda/block_put.h``; only the spread over the grid depends on it."""


@dataclass(frozen=True, slots=True)
class PutPlan:
    """Ranges that have been checked, where the kernel can read them: made by :func:`put_plan` only."""

    ranges: Tensor
    """[num_ranges, 3] int64: source offset, target offset, nbytes."""
    num_ranges: int
    max_nbytes: int
    """Of one range."""
    source_nbytes: int
    """No range reads past this many bytes of a layer of the source."""
    target_nbytes: int


def put_plan(ranges: Sequence[tuple[int, int, int]], device: torch.device) -> PutPlan:
    """Ranges as (source offset, target offset, nbytes) in bytes from the start of a layer.

    The upload does not wait for the device. Raises ``ValueError`` for a range that starts below 0 or is
    empty, and for two that write the same byte.
    """
    table = np.asarray(ranges, dtype=np.int64).reshape(-1, 3)
    if len(table) and (table[:, :2].min() < 0 or table[:, 2].min() < 1):
        raise ValueError("ranges: offsets must be at least 0 and nbytes at least 1")
    source_ends, target_ends = table[:, 0] + table[:, 2], table[:, 1] + table[:, 2]
    order = np.argsort(table[:, 1])
    if (target_ends[order][:-1] > table[order, 1][1:]).any():
        raise ValueError("ranges: two of them write the same byte of the target")
    held = torch.from_numpy(table.copy())
    if device.type == "cuda":
        held = held.pin_memory().to(device, non_blocking=True)
    return PutPlan(
        ranges=held,
        num_ranges=len(table),
        max_nbytes=int(table[:, 2].max(initial=0)),
        source_nbytes=int(source_ends.max(initial=0)),
        target_nbytes=int(target_ends.max(initial=0)),
    )


def block_put(
    source: Tensor,
    target: Tensor,
    plan: PutPlan,
    *,
    num_layers: int = 1,
    source_layer_nbytes: int = 0,
    target_layer_nbytes: int = 0,
    signal: ArrivalSignal | None = None,
    max_thread_blocks: int | None = None,
) -> None:
    """Copy the plan's ranges in each of ``num_layers`` layers, each layer followed by its signal.

    source, target: contiguous, any dtype and shape, starting at the first layer that is copied; a layer
    starts ``*_layer_nbytes`` bytes after the one before it. On CUDA either may be memory of a peer that is
    mapped here, so the same call puts and gets; they must not overlap. Layers arrive in any order, each with
    a word of its own in ``signal``. Fewer ``max_thread_blocks`` (a layer) leave multiprocessors to other
    streams; None: as many as the device holds, over all layers.

    On CUDA this is one launch on the current stream of the device that holds the plan. Raises ``ValueError``
    naming the argument; :class:`~microserve.kernels.cuda_module.KernelUnavailable`.
    """
    if num_layers < 1 or num_layers >= 1 << 16:
        raise ValueError(f"num_layers {num_layers} is outside [1, 65535]")
    if max_thread_blocks is not None and max_thread_blocks < 1:
        raise ValueError(f"max_thread_blocks {max_thread_blocks} must be at least 1")
    _check("source", source, plan.source_nbytes, num_layers, source_layer_nbytes, plan.ranges)
    _check("target", target, plan.target_nbytes, num_layers, target_layer_nbytes, plan.ranges)
    if num_layers > 1 and target_layer_nbytes < plan.target_nbytes:
        raise ValueError(
            f"target_layer_nbytes {target_layer_nbytes}: ranges reach {plan.target_nbytes} bytes into a layer"
        )
    device = plan.ranges.device
    if signal is not None:
        signal.check(num_layers, device)
    if device.type != "cuda":
        _put_on_cpu(source, target, plan, num_layers, source_layer_nbytes, target_layer_nbytes)
        if signal is not None:
            signal.raise_on_cpu()
        return
    if plan.num_ranges == 0 and signal is None:
        return
    if max_thread_blocks is None:
        held = cuda_module.num_multiprocessors(device) * THREAD_BLOCKS_PER_MULTIPROCESSOR
        max_thread_blocks = -(-held // num_layers)
    put_launch(
        source.data_ptr(),
        target.data_ptr(),
        plan,
        num_layers,
        (source_layer_nbytes, target_layer_nbytes),
        signal,
        max_thread_blocks,
    ).enqueue(device)


def put_launch(
    source: int,
    target: int,
    plan: PutPlan,
    num_layers: int,
    layer_nbytes: tuple[int, int],
    signal: ArrivalSignal | None,
    max_thread_blocks: int,
) -> Launch:
    """What :func:`block_put` enqueues, for arguments that it has checked.

    source, target: addresses on the device; layer_nbytes: of the source, of the target.
    """
    width, pieces = launch_shape(plan.num_ranges, plan.max_nbytes, max_thread_blocks)
    arguments: tuple[np.generic, ...] = (
        *(np.uint64(source), np.uint64(target)),
        *(np.int64(nbytes) for nbytes in layer_nbytes),
        *(np.uint64(plan.ranges.data_ptr()), np.uint32(plan.num_ranges), np.uint32(pieces)),
        *signal_arguments(signal),
    )
    return Launch("block_put", "block_put", (width, num_layers), (NUM_THREADS, 1), arguments)


def launch_shape(num_ranges: int, max_nbytes: int, max_thread_blocks: int) -> tuple[int, int]:
    """(thread blocks of a layer, pieces of a range)."""
    pieces = max(1, -(-max_nbytes // PIECE_NBYTES))
    return max(1, min(num_ranges * pieces, max_thread_blocks)), pieces


def _check(
    name: str, memory: Tensor, range_nbytes: int, num_layers: int, layer_nbytes: int, ranges: Tensor
) -> None:
    if not memory.is_contiguous():
        raise ValueError(f"{name} is not contiguous")
    if memory.device.type != ranges.device.type:
        raise ValueError(f"{name} is on {memory.device}, the plan on {ranges.device}")
    if layer_nbytes < 0:
        raise ValueError(f"{name}_layer_nbytes {layer_nbytes} must be at least 0")
    needed = (num_layers - 1) * layer_nbytes + range_nbytes
    if memory.nbytes < needed:
        raise ValueError(f"{name} has {memory.nbytes} bytes, {num_layers} layers of the plan reach {needed}")


def _put_on_cpu(
    source: Tensor, target: Tensor, plan: PutPlan, num_layers: int, source_step: int, target_step: int
) -> None:
    read, written = (memory.view(-1).view(torch.uint8) for memory in (source, target))
    for layer in range(num_layers):
        for source_offset, target_offset, nbytes in plan.ranges.tolist():
            begin, to = source_offset + layer * source_step, target_offset + layer * target_step
            written[to : to + nbytes] = read[begin : begin + nbytes]
