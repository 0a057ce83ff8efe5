"""Quantise-and-scatter and dequantise-gather in Triton.

Owns the kernels and their launches; ``kv_quantize.py`` says what they mean, checks the arguments and is what
callers use. Needs Triton to be imported.

e4m3 is encoded and decoded by integer arithmetic, not by a cast: the cast exists only from sm_89 on, is wrong
in Triton's interpreter, and the kernel waits for memory either way. So one code serves every device, and a
machine without one can check each bit of it.
"""

# Triton publishes no types, and a kernel's arguments are not Python values.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microserve.kernels.scatter.arrival_signal import ArrivalSignal
from microserve.kernels.triton_address import pair_tile, paired_rows


@triton.jit
def encode_e4m3(values):
    """fp32 within [-448, 448] to e4m3 as uint8, to nearest with ties to even."""
    bits = values.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    # Below 2^-6 the code counts steps of 2^-9: adding 2^14 makes the fp32 addition round to one.
    small = (bits.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    # Else rebias the exponent from 127 to 7 and round 23 bits of mantissa to 3.
    normal = (bits - (120 << 23) + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    return (tl.where(bits < (121 << 23), small, normal) | sign).to(tl.uint8)


@triton.jit
def decode_e4m3(codes):
    """e4m3 as uint8 to fp32, exactly; NaN for 0x7F and 0xFF."""
    wide = codes.to(tl.uint32)
    magnitude = wide & 0x7F
    small = magnitude.to(tl.float32) * 0.001953125
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    values = tl.where(magnitude < 8, small, normal)
    values = tl.where(magnitude == 0x7F, float("nan"), values)
    # By its bit: Triton's minus is 0 - x, which has no negative zero.
    return (values.to(tl.uint32, bitcast=True) | ((wide & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def _round_half_even(values):
    """Of magnitudes below 2^22: 1.5 * 2^23 leaves fp32 no bits for a fraction."""
    return (values + 12582912.0) - 12582912.0


@triton.jit(do_not_specialize=["num_tokens", "num_slots", "sequence"])
def scatter_kernel(
    key,
    value,
    slots,
    codes,
    scales,
    counter,
    word,
    sequence: tl.int64,
    num_tokens,
    num_slots,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    FLOAT: tl.constexpr,
    SIGNAL: tl.constexpr,
):
    """ROWS (token, head) pairs, of K in the grid's second axis 0 and of V in 1."""
    half = tl.program_id(1)
    _, tokens, heads, written, target = paired_rows(
        slots, half, num_tokens, num_slots, BLOCK_SIZE, NUM_HEADS, ROWS
    )
    dims = tl.arange(0, DIM)
    there = written[:, None] & (dims < HEAD_DIM)[None, :]
    if half == 0:
        places = (tokens * key_token_stride + heads * key_head_stride)[:, None] + dims[None, :]
        rows = tl.load(key + places, mask=there, other=0.0).to(tl.float32)
    else:
        places = (tokens * value_token_stride + heads * value_head_stride)[:, None] + dims[None, :]
        rows = tl.load(value + places, mask=there, other=0.0).to(tl.float32)

    absmax = tl.max(tl.abs(rows), 1)
    greatest = 448.0 if FLOAT else 127.0
    scale = tl.where(absmax > 1e-30, tl.div_rn(absmax, tl.full([ROWS], greatest, tl.float32)), 1.0)
    ratios = tl.div_rn(rows, tl.broadcast_to(scale[:, None], [ROWS, DIM]))
    ratios = tl.where((absmax > 1e-30)[:, None], ratios, 0.0)
    if FLOAT:
        # A quotient may round to just above the greatest code, and is that code.
        bounded = tl.minimum(tl.maximum(ratios, -448.0), 448.0)
        tl.store(codes + target[:, None] * HEAD_DIM + dims[None, :], encode_e4m3(bounded), mask=there)
    else:
        whole = _round_half_even(ratios).to(tl.int8)
        tl.store(codes + target[:, None] * HEAD_DIM + dims[None, :], whole, mask=there)
    tl.store(scales + target, scale, mask=written)

    if SIGNAL:  # in the order that cuda/arrival.cuh proves: stores, barrier, count, and the last one signals
        tl.debug_barrier()
        arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="sys")
        if arrived == tl.num_programs(0) * tl.num_programs(1) - 1:
            tl.atomic_xchg(counter, 0, sem="relaxed", scope="gpu")
            tl.atomic_xchg(word, sequence, sem="release", scope="sys")


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def gather_kernel(
    codes,
    scales,
    slots,
    key,
    value,
    num_tokens,
    num_slots,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """ROWS (token, head) pairs, of K in the grid's second axis 0 and of V in 1; key, value: contiguous."""
    half = tl.program_id(1)
    pairs, _, _, held, source = paired_rows(slots, half, num_tokens, num_slots, BLOCK_SIZE, NUM_HEADS, ROWS)
    dims = tl.arange(0, DIM)
    there = held[:, None] & (dims < HEAD_DIM)[None, :]
    raw = tl.load(codes + source[:, None] * HEAD_DIM + dims[None, :], mask=there, other=0)
    scale = tl.load(scales + source, mask=held, other=1.0)
    plain = decode_e4m3(raw) if FLOAT else raw.to(tl.float32)
    values = plain * scale[:, None]
    places = pairs[:, None] * HEAD_DIM + dims[None, :]
    if half == 0:
        tl.store(key + places, values.to(key.dtype.element_ty), mask=there)
    else:
        tl.store(value + places, values.to(value.dtype.element_ty), mask=there)


def launch_scatter(
    key: Tensor, value: Tensor, slots: Tensor, codes: Tensor, scales: Tensor, signal: ArrivalSignal | None
) -> None:
    """As ``kv_quantize.quantize_scatter``, unchecked; no launch for no tokens and no signal."""
    num_tokens = key.shape[0]
    if num_tokens == 0 and signal is None:
        return
    num_blocks, _, block_size, num_heads, head_dim = codes.shape
    dim, rows = pair_tile(head_dim)
    grid = (max(1, triton.cdiv(num_tokens * num_heads, rows)), 2)
    floating = codes.dtype == torch.float8_e4m3fn
    counter, word, sequence = slots, slots, 0  # never touched without a signal
    if signal is not None:
        counter, word, sequence = signal.counters, signal.words, signal.value
    scatter_kernel[grid](
        *(key, value, slots, codes.view(torch.uint8) if floating else codes, scales, counter, word, sequence),
        *(num_tokens, num_blocks * block_size, *key.stride()[:2], *value.stride()[:2]),
        *(block_size, num_heads, head_dim, dim, rows, floating, signal is not None),
    )


def launch_gather(codes: Tensor, scales: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Into contiguous ``key`` and ``value`` full of zeros; as ``dequantize_gather``, unchecked."""
    num_tokens = slots.shape[0]
    if num_tokens == 0:
        return
    num_blocks, _, block_size, num_heads, head_dim = codes.shape
    dim, rows = pair_tile(head_dim)
    floating = codes.dtype == torch.float8_e4m3fn
    gather_kernel[(triton.cdiv(num_tokens * num_heads, rows), 2)](
        *(codes.view(torch.uint8) if floating else codes, scales, slots, key, value),
        *(num_tokens, num_blocks * block_size, block_size, num_heads, head_dim, dim, rows, floating),
    )
