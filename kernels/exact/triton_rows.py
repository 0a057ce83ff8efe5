"""What a layer does with each row, or each value, on its own: RMSNorm and SiLU, in Triton.

A row is one program's, so its sum has one order; a value's function is one instruction sequence, which a
library may have several of, for the middle of a tensor and for its end.

Owns the kernels and their launches. Must not know models. Needs Triton to be imported.
"""

# Triton publishes no types, and a kernel's arguments are not Python values.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microserve.kernels.exact.launch import OPTIONS, in_place

VALUES = 1024
"""Of one program of the activation."""
MAX_LENGTH = 1 << 16
"""Values of a row that a norm takes: it holds all of them at once."""


@triton.jit
def norm_kernel(x, weight, out, eps, LENGTH: tl.constexpr, TILE: tl.constexpr):
    """One row: x / sqrt(mean(x * x) + eps), rounded to its dtype, times weight."""
    columns = tl.arange(0, TILE)
    held = columns < LENGTH
    place = tl.program_id(0).to(tl.int64) * LENGTH + columns
    values = tl.load(x + place, mask=held, other=0.0).to(tl.float32)
    mean = tl.sum(values * values, 0) / LENGTH
    scaled = (values * tl.rsqrt(mean + eps)).to(out.dtype.element_ty).to(tl.float32)
    factors = tl.load(weight + columns, mask=held, other=0.0).to(tl.float32)
    tl.store(out + place, (factors * scaled).to(out.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=["num_values"])
def silu_kernel(x, out, num_values, TILE: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    held = places < num_values
    values = tl.load(x + places, mask=held, other=0.0).to(tl.float32)
    tl.store(out + places, (values / (1.0 + tl.exp(-values))).to(out.dtype.element_ty), mask=held)


def norm_warps(length: int) -> int:
    return min(max(int(triton.next_power_of_2(length)) // 512, 1), 16)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., length], weight [length], of one dtype. Launched on the current device."""
    length = weight.shape[0]
    given = in_place(x)
    out = torch.empty_like(given)
    if given.numel():
        norm_kernel[(given.numel() // length,)](
            *(given, in_place(weight), out, eps, length, triton.next_power_of_2(length)),
            num_warps=norm_warps(length),
            **OPTIONS,
        )
    return out


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)) of every value. Launched on the current device."""
    given = in_place(x)
    out = torch.empty_like(given)
    if given.numel():
        silu_kernel[(triton.cdiv(given.numel(), VALUES),)](
            given, out, given.numel(), VALUES, num_warps=4, **OPTIONS
        )
    return out
