"""KV in 8 bits: what a code and a scale mean, and how rows get into blocks of codes and back.

    code    [num_blocks, 2, block_size, num_kv_heads, head_dim]   int8 or float8_e4m3fn
    scale   [num_blocks, 2, block_size, num_kv_heads]             fp32, one per row and head of K and of V
    value = code * scale

The scale is the greatest absolute value of the head's row divided by the greatest code (127, or 448 for
e4m3), so a round trip is off by at most scale / 2 in int8 and by 1/16 of the value in e4m3 (or scale * 2^-10,
for values that small). Codes round to nearest, ties to even. A row with nothing above 1e-30 has scale 1 and
codes 0. Values must be finite.

Owns these rules, the checks and the plain-torch version, which CPU tensors take; ``triton_quantize.py``
executes them on CUDA, equal in every byte. Must not know who transfers the blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from microserve.kernels.scatter.arrival_signal import ArrivalSignal

GREATEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
LEAST_ABSMAX = 1e-30
"""Below it a scale could leave the normal range of fp32, where devices differ."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantize(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes like ``rows``, scales [...] fp32) of rows [..., head_dim] in fp32, fp16 or bf16."""
    values = rows.float()
    absmax = values.abs().amax(-1)
    scales = torch.where(absmax > LEAST_ABSMAX, absmax / GREATEST_CODE[dtype], 1.0)
    codes = values / scales.unsqueeze(-1)
    codes = torch.where((absmax > LEAST_ABSMAX).unsqueeze(-1), codes, 0.0)
    return (torch.round(codes) if dtype == torch.int8 else codes).to(dtype), scales


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [..., head_dim] of ``dtype``, from codes of the same shape and scales [...]."""
    return (codes.float() * scales.unsqueeze(-1)).to(dtype)


def quantize_scatter(
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    codes: Tensor,
    scales: Tensor,
    *,
    signal: ArrivalSignal | None = None,
) -> None:
    """Write the codes and scales of new rows to their slots, then raise ``signal``.

    key, value: [num_tokens, num_kv_heads, head_dim] in fp32, fp16 or bf16, a head's values side by side;
    slots: [num_tokens] int64, ``block * block_size + row``; a token whose slot is outside
    [0, num_blocks * block_size) is not written, and no slot may occur twice. codes, scales: contiguous, as in
    the module's docstring; on CUDA they may be memory of a peer that is mapped here. One launch there. Raises
    ``ValueError`` naming the argument.
    """
    _check_pool(codes, scales)
    _check_rows("key", key, key, codes)
    _check_rows("value", value, key, codes)
    _check_slots(slots, key.shape[0], key.device)
    if codes.device.type != key.device.type:
        raise ValueError(f"codes is on {codes.device}, key on {key.device}")
    if signal is not None:
        signal.check(1, key.device)
    if key.is_cuda:
        from microserve.kernels.quantize import triton_quantize

        with torch.cuda.device(key.device):  # Triton launches on the current one
            triton_quantize.launch_scatter(key, value, slots, codes, scales, signal)
        return
    tokens, blocks, rows = _places(slots, codes)
    for half, tensor in enumerate((key, value)):
        row_codes, row_scales = quantize(tensor[tokens], codes.dtype)
        # As bytes: torch has no index_put for 8-bit floats.
        codes.view(torch.uint8)[blocks, half, rows] = row_codes.view(torch.uint8)
        scales[blocks, half, rows] = row_scales
    if signal is not None:
        signal.raise_on_cpu()


def dequantize_gather(
    codes: Tensor, scales: Tensor, slots: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(key, value), each [num_tokens, num_kv_heads, head_dim] of ``dtype``: the rows at ``slots``.

    Arguments as for :func:`quantize_scatter`; here a slot may occur any number of times, and one that is
    outside the pool gives zeros. Raises ``ValueError`` naming the argument.
    """
    _check_pool(codes, scales)
    _check_slots(slots, slots.shape[0] if slots.dim() else 0, codes.device)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}, one of {_DTYPES} is needed")
    shape = (slots.shape[0], *codes.shape[3:])
    key, value = (torch.zeros(shape, dtype=dtype, device=codes.device) for _ in range(2))
    if codes.is_cuda:
        from microserve.kernels.quantize import triton_quantize

        with torch.cuda.device(codes.device):
            triton_quantize.launch_gather(codes, scales, slots, key, value)
        return key, value
    tokens, blocks, rows = _places(slots, codes)
    for half, tensor in enumerate((key, value)):
        row_codes = codes.view(torch.uint8)[blocks, half, rows].view(codes.dtype)
        tensor[tokens] = dequantize(row_codes, scales[blocks, half, rows], dtype)
    return key, value


def _places(slots: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, blocks, rows) of the slots that are inside the pool."""
    block_size = codes.shape[2]
    tokens = ((slots >= 0) & (slots < codes.shape[0] * block_size)).nonzero().squeeze(1)
    kept = slots[tokens]
    return tokens, kept // block_size, kept % block_size


def _check_pool(codes: Tensor, scales: Tensor) -> None:
    if codes.dim() != 5 or codes.shape[1] != 2 or not codes.is_contiguous():
        raise ValueError(
            f"codes is {tuple(codes.shape)}, [num_blocks, 2, block_size, num_kv_heads, head_dim], contiguous,"
            " is needed"
        )
    if codes.dtype not in GREATEST_CODE:
        raise ValueError(f"codes is {codes.dtype}, one of {tuple(GREATEST_CODE)} is needed")
    if scales.dtype != torch.float32 or scales.shape != codes.shape[:-1] or not scales.is_contiguous():
        raise ValueError(
            f"scales is {scales.dtype} {tuple(scales.shape)}, contiguous float32 {tuple(codes.shape[:-1])} is"
            " needed"
        )
    if scales.device != codes.device:
        raise ValueError(f"scales is on {scales.device}, codes on {codes.device}")


def _check_rows(name: str, rows: Tensor, key: Tensor, codes: Tensor) -> None:
    if rows.dim() != 3 or rows.shape[1:] != codes.shape[3:] or rows.shape[0] != key.shape[0]:
        raise ValueError(
            f"{name} is {tuple(rows.shape)}, [{key.shape[0]}, {codes.shape[3]}, {codes.shape[4]}] is needed"
        )
    if rows.dtype not in _DTYPES or rows.dtype != key.dtype:
        raise ValueError(f"{name} is {rows.dtype}, one of {_DTYPES}, for key and value the same, is needed")
    if rows.shape[2] > 1 and rows.stride(2) != 1:
        raise ValueError(f"{name} has strides {rows.stride()}: a head's values must lie side by side")
    if rows.device != key.device:
        raise ValueError(f"{name} is on {rows.device}, key on {key.device}")


def _check_slots(slots: Tensor, num_tokens: int, device: torch.device) -> None:
    if slots.dtype != torch.int64 or slots.shape != (num_tokens,) or not slots.is_contiguous():
        raise ValueError(
            f"slots is {slots.dtype} {tuple(slots.shape)}, contiguous int64 [{num_tokens}] is needed"
        )
    if slots.device != device:
        raise ValueError(f"slots is on {slots.device}, the rows on {device}")
