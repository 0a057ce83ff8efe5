"""New keys and values into the blocks of a pool, which may be a peer's: the layer-wise transfer of prefill.

Owns the checks, the choice of the copied unit and the shape of the launch; the kernel and its address
arithmetic are in ``cuda/block_scatter.*``. Must not know who owns the blocks or how peers are mapped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from microserve.kernels import cuda_module
from microserve.kernels.attention.paged_attention import write_kv
from microserve.kernels.cuda_module import Launch
from microserve.kernels.scatter.arrival_signal import ArrivalSignal, signal_arguments

MAX_THREADS = 256
THREAD_BLOCKS_PER_MULTIPROCESSOR = 8
"""Of 256 threads: 2,048, all that an H100 or A100 multiprocessor holds."""
TOKENS_IN_FLIGHT = 2
"""As in ``cuda/block_scatter.h``; only the size of the grid depends on it."""
_UNITS = (16, 4, 2)


@dataclass(frozen=True, slots=True)
class RowShape:
    """The rows of K, and of V, as the kernel reads them, in bytes: side by side heads count as one."""

    num_heads: int
    head_nbytes: int
    key_strides: tuple[int, int]
    """Token, head."""
    value_strides: tuple[int, int]
    unit: int
    """Bytes of one load or store: 16, 4 or 2."""

    @property
    def units_per_row(self) -> int:
        return self.num_heads * self.head_nbytes // self.unit


def block_scatter(
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    layer: Tensor,
    *,
    signal: ArrivalSignal | None = None,
    max_thread_blocks: int | None = None,
) -> None:
    """Write the rows of ``key`` and ``value`` to their slots in ``layer``, then raise ``signal``.

    key, value: [num_tokens, num_kv_heads, head_dim], any 2- or 4-byte dtype, copied as bytes; any strides
    but that a head's values lie side by side. slots: [num_tokens] int64, contiguous,
    ``block * block_size + row``; a token whose slot is outside [0, num_blocks * block_size), -1 say, is not
    written, and no slot may occur twice. layer: [num_blocks, 2, block_size, num_kv_heads, head_dim] of the
    same dtype, contiguous; on CUDA it may be memory of a peer that is mapped here. Fewer
    ``max_thread_blocks`` leave multiprocessors to other streams; None: as many as the device holds.

    On CUDA this is one launch on the current stream, also for no tokens if there is a signal. Raises
    ``ValueError`` naming the argument; :class:`~microserve.kernels.cuda_module.KernelUnavailable`.
    """
    check_rows(key, value, slots, layer)
    if max_thread_blocks is not None and max_thread_blocks < 1:
        raise ValueError(f"max_thread_blocks {max_thread_blocks} must be at least 1")
    if signal is not None:
        signal.check(1, key.device)
    if not key.is_cuda:
        written = (slots >= 0) & (slots < layer.shape[0] * layer.shape[2])
        write_kv(layer, key, value, torch.where(written, slots, -1))
        if signal is not None:
            signal.raise_on_cpu()
        return
    if key.shape[0] == 0 and signal is None:
        return
    if max_thread_blocks is None:
        max_thread_blocks = cuda_module.num_multiprocessors(key.device) * THREAD_BLOCKS_PER_MULTIPROCESSOR
    scatter_launch(key, value, slots, layer, signal, max_thread_blocks).enqueue(key.device)


def scatter_launch(
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    layer: Tensor,
    signal: ArrivalSignal | None,
    max_thread_blocks: int,
) -> Launch:
    """What :func:`block_scatter` enqueues, for arguments that it has checked."""
    num_tokens, block_size = key.shape[0], layer.shape[2]
    shape = row_shape(key, value, layer.data_ptr())
    grid, block = launch_shape(num_tokens, shape.units_per_row, max_thread_blocks)
    arguments: tuple[np.generic, ...] = (
        *(np.uint64(key.data_ptr()), np.uint64(value.data_ptr())),
        *(np.int64(stride) for stride in (*shape.key_strides, *shape.value_strides)),
        *(np.uint64(slots.data_ptr()), np.uint64(layer.data_ptr())),
        *(np.uint32(layer.shape[0] * block_size), np.uint32(block_size), np.uint32(num_tokens)),
        *(np.uint32(shape.num_heads), np.uint32(shape.head_nbytes)),
        *signal_arguments(signal),
    )
    return Launch("block_scatter", f"block_scatter_{shape.unit}", grid, block, arguments)


def row_shape(key: Tensor, value: Tensor, target_address: int) -> RowShape:
    """How to read the rows, in the widest unit that all addresses and lengths are a multiple of."""
    nbytes = key.element_size()
    num_heads, head_nbytes = key.shape[1], key.shape[2] * nbytes
    (key_token, key_head), (value_token, value_head) = (
        (tensor.stride(0) * nbytes, tensor.stride(1) * nbytes) for tensor in (key, value)
    )
    if num_heads == 1 or key_head == value_head == head_nbytes:
        num_heads, head_nbytes, key_head, value_head = 1, num_heads * head_nbytes, 0, 0
    together = head_nbytes | key_token | key_head | value_token | value_head
    together |= key.data_ptr() | value.data_ptr() | target_address
    unit = next(unit for unit in _UNITS if together % unit == 0)
    return RowShape(num_heads, head_nbytes, (key_token, key_head), (value_token, value_head), unit)


def launch_shape(
    num_tokens: int, units_per_row: int, max_thread_blocks: int
) -> tuple[tuple[int], tuple[int, int]]:
    """(grid, thread block): threads along the row first, then along tokens."""
    along_row = min(units_per_row, MAX_THREADS)
    along_tokens = max(1, MAX_THREADS // along_row)
    wanted = -(-num_tokens // (along_tokens * TOKENS_IN_FLIGHT))
    return (max(1, min(wanted, max_thread_blocks)),), (along_row, along_tokens)


def check_rows(key: Tensor, value: Tensor, slots: Tensor, layer: Tensor) -> None:
    """As ``block_scatter`` wants them. Raises ``ValueError`` naming the argument."""
    if layer.dim() != 5 or layer.shape[1] != 2:
        raise ValueError(
            f"layer is {tuple(layer.shape)}, [num_blocks, 2, block_size, num_kv_heads, head_dim] is needed"
        )
    if not layer.is_contiguous():
        raise ValueError("layer is not contiguous")
    if layer.element_size() not in (2, 4):
        raise ValueError(f"layer is {layer.dtype}, a dtype of 2 or 4 bytes is needed")
    if layer.shape[0] * layer.shape[2] >= 1 << 31:
        raise ValueError(f"layer has {layer.shape[0]} blocks of {layer.shape[2]} rows, below 2^31 rows fit")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() != 3 or tensor.shape[1:] != layer.shape[3:] or tensor.shape[0] != key.shape[0]:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}, [{key.shape[0]}, {layer.shape[3]}, {layer.shape[4]}] is"
                " needed"
            )
        if tensor.dtype != layer.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, layer is {layer.dtype}")
        if tensor.shape[2] > 1 and tensor.stride(2) != 1:
            raise ValueError(f"{name} has strides {tensor.stride()}: a head's values must lie side by side")
        if tensor.device != key.device:
            raise ValueError(f"{name} is on {tensor.device}, key on {key.device}")
    if slots.dtype != torch.int64 or slots.shape != key.shape[:1]:
        raise ValueError(f"slots is {slots.dtype} {tuple(slots.shape)}, int64 [{key.shape[0]}] is needed")
    if not slots.is_contiguous():
        raise ValueError("slots is not contiguous")
    if slots.device != key.device:
        raise ValueError(f"slots is on {slots.device}, key on {key.device}")
    if layer.device.type != key.device.type:
        raise ValueError(f"layer is on {layer.device}, key on {key.device}")
