"""New keys and values into the blocks of a pool, in Triton: for machines without nvcc or CuPy.

Owns the kernel and its launch; ``kv_scatter.py`` decides when it is used, and checks the arguments. Needs
Triton to be imported.

Slots are read on the device and a token without one is skipped there, so a launch can be captured in a CUDA
graph; torch's index copies could not, as they need to be told how many rows there are.
"""

# Triton publishes no types, and a kernel's arguments are not Python values.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microserve.kernels.triton_address import pair_tile, paired_rows


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def scatter_kernel(
    key,
    value,
    slots,
    layer,
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
):
    """ROWS (token, head) pairs, of K in the grid's second axis 0 and of V in 1."""
    half = tl.program_id(1)
    _, tokens, heads, held, places = paired_rows(
        slots, half, num_tokens, num_slots, BLOCK_SIZE, NUM_HEADS, ROWS
    )
    dims = tl.arange(0, DIM)
    there = held[:, None] & (dims < HEAD_DIM)[None, :]
    targets = layer + places[:, None] * HEAD_DIM + dims[None, :]
    if half == 0:
        sources = (tokens * key_token_stride + heads * key_head_stride)[:, None] + dims[None, :]
        tl.store(targets, tl.load(key + sources, mask=there, other=0), mask=there)
    else:
        sources = (tokens * value_token_stride + heads * value_head_stride)[:, None] + dims[None, :]
        tl.store(targets, tl.load(value + sources, mask=there, other=0), mask=there)


def launch_scatter(key: Tensor, value: Tensor, slots: Tensor, layer: Tensor) -> None:
    """As ``block_scatter.block_scatter`` without a signal, unchecked; no launch for no tokens."""
    num_tokens = key.shape[0]
    if num_tokens == 0:
        return
    num_blocks, _, block_size, num_heads, head_dim = layer.shape
    dim, rows = pair_tile(head_dim)
    raw = torch.int16 if layer.element_size() == 2 else torch.int32  # bytes are copied, whatever they mean
    scatter_kernel[(triton.cdiv(num_tokens * num_heads, rows), 2)](
        *(key.view(raw), value.view(raw), slots, layer.view(raw)),
        *(num_tokens, num_blocks * block_size, *key.stride()[:2], *value.stride()[:2]),
        *(block_size, num_heads, head_dim, dim, rows),
    )
