"""A step's own keys and values into its blocks, by whichever kernel this machine has.

Owns that choice, made once for each device. Must not know who owns the blocks.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from microserve.kernels import cuda_module
from microserve.kernels.kernel_cache import KernelUnavailable
from microserve.kernels.scatter.block_scatter import block_scatter, check_rows


def kv_scatter(key: Tensor, value: Tensor, slots: Tensor, layer: Tensor) -> None:
    """As ``block_scatter`` without a signal: one launch, and nothing waits for the device.

    By the CUDA kernel; where it cannot be had (``missing_kernel``) by one in Triton. Raises ``ValueError``
    naming the argument.
    """
    if not key.is_cuda or missing_kernel(key.device) is None:
        block_scatter(key, value, slots, layer)
        return
    check_rows(key, value, slots, layer)
    from microserve.kernels.scatter import triton_scatter

    with torch.cuda.device(key.device):  # Triton launches on the current one
        triton_scatter.launch_scatter(key, value, slots, layer)


@functools.cache
def missing_kernel(device: torch.device) -> str | None:
    """Why a CUDA device goes without the CUDA kernels, in one line; None: they are loaded.

    The first call builds and loads them, which may take a minute and must not happen while a CUDA graph is
    captured. The answer stays.
    """
    try:
        cuda_module.load(device)
    except KernelUnavailable as error:
        return str(error)
    return None
