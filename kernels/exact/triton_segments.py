"""Paged attention whose bits depend on a token and its context alone: one kernel for decode and prefill.

A context is cut at multiples of SEGMENT positions, whatever the batch, and each segment is attended to from
its own start, in tiles of keys at multiples of their size. So a token goes through the same tiles in the same
order whether it came alone, in a chunk, behind a cached prefix or behind received KV; a tile that it sees
nothing of changes nothing. What the segments gave is merged in their order.

    query tile of one sequence ──> segment 0 | segment 1 | ...   each a program, into partial and stats
    token and head             ──> merged, first to last         (attention/triton_attention.py)

Not alike is a value that is infinite or no number: in a chunk it reaches the tokens before it too (0 times
infinity), if they share its tile of keys.

Owns the kernel, its tiles, how long a segment is, and the launches. Must not know models or schedulers.
Needs Triton to be imported.
"""

# Triton publishes no types, and a kernel's arguments are not Python values.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from microserve.kernels.attention.gpu_attention import DeviceBatch, check_batch
from microserve.kernels.attention.triton_attention import Tiles, attend, find_tile, padded, reduce_kernel
from microserve.kernels.exact.launch import ALIGNMENT, OPTIONS, in_place

SEGMENT = 512
"""Positions: few enough that one long context is worked on by many multiprocessors, and so many that a
prefill's partial results, an fp32 row each, are little beside the keys and values."""
WORKSPACE_NBYTES = 64 << 20
"""Of partial results at once; more tokens take more launches."""
MERGED = 16
"""Segments that the merge takes at a time."""
_STEP = 8
"""Tokens of a launch are a multiple of it, so that the next one's rows begin at an aligned address."""


@triton.jit(
    do_not_specialize=["table_stride", "num_sequences", "first_token", "end_token"],
    do_not_specialize_on_alignment=["query_starts", "context_lens", "block_tables"],
)
def segment_kernel(
    query,
    kv,
    partial,
    stats,
    query_starts,
    context_lens,
    block_tables,
    table_stride,
    scale,
    num_sequences,
    first_token,
    end_token,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SHARE: tl.constexpr,
    SHARE_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """One segment of the context of a tile of one sequence's tokens, and all query heads of one KV head.

    To partial [end_token - first_token, head, segment, HEAD_DIM] fp32, undivided, and stats [..., 2] fp32:
    the peak of the scores in powers of two (minus infinity: nothing was seen), and the weight.
    """
    TOKENS: tl.constexpr = ROWS // SHARE_ROWS
    kv_head = tl.program_id(1)
    segment = tl.program_id(2)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest contexts first
    first_sequence = tl.full([], 0, tl.int32)
    sequence, begin, query_len, first = find_tile(query_starts, tile, first_sequence, num_sequences, TOKENS)
    if first >= query_len:
        return
    if (begin + first >= end_token) | (begin + first + TOKENS <= first_token):
        return
    context_len = tl.load(context_lens + sequence)
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    tokens = first + rows // SHARE_ROWS
    share = rows % SHARE_ROWS
    heads = kv_head * SHARE + share
    places = (begin + tokens).to(tl.int64)
    held = (tokens < query_len) & (share < SHARE) & (places >= first_token) & (places < end_token)
    there = held[:, None] & (dims < HEAD_DIM)[None, :]
    in_query = (places * (NUM_KV_HEADS * SHARE) + heads)[:, None] * HEAD_DIM + dims[None, :]
    queries = tl.load(query + in_query, mask=there, other=0.0)

    earliest = context_len - query_len + first
    start = segment * SEGMENT
    end = tl.minimum(tl.minimum(earliest + TOKENS, context_len), start + SEGMENT)
    if WINDOW > 0:
        start = tl.maximum(start, tl.maximum(earliest - WINDOW + 1, 0) // KEYS * KEYS)
    total, peak, weight = attend(
        *(queries, tl.zeros([ROWS, DIM], tl.float32), tl.full([ROWS], float("-inf"), tl.float32)),
        *(tl.zeros([ROWS], tl.float32), kv + kv_head * HEAD_DIM),
        *(block_tables + sequence.to(tl.int64) * table_stride, context_len - query_len + tokens),
        *(start, end, scale),
        *(True, WINDOW, BLOCK_SIZE, NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, DIM, KEYS),
    )
    place = ((places - first_token) * (NUM_KV_HEADS * SHARE) + heads) * tl.num_programs(2) + segment
    tl.store(stats + place * 2, peak, mask=held)
    tl.store(stats + place * 2 + 1, weight, mask=held)
    worked = there & (peak > float("-inf"))[:, None]
    tl.store(partial + place[:, None] * HEAD_DIM + dims[None, :], total, mask=worked)


def segment_tiles(head_dim: int, element_nbytes: int) -> Tiles:
    """One for each kind of model: what fits 99 KiB of shared memory (a test compiles each)."""
    dim = padded(head_dim)
    if element_nbytes == 4:
        return Tiles(16, 32, 4, 2) if dim <= 128 else Tiles(16, 16, 4, 2)
    return Tiles(64, 64, 4, 2) if dim <= 128 else Tiles(64, 32, 4, 2)


def paged_attention(
    query: Tensor,
    kv: Tensor,
    batch: DeviceBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    tiles: Tiles | None = None,
    segment: int = SEGMENT,
    workspace_nbytes: int = WORKSPACE_NBYTES,
) -> Tensor:
    """As ``gpu_attention.paged_attention``; ``batch.num_decodes`` says nothing here. segment: a multiple of
    the tile's keys. Launched on the current device; raises ``ValueError`` naming the argument."""
    check_batch(query, kv, batch)
    if kv.data_ptr() % ALIGNMENT:
        raise ValueError(f"kv is at {kv.data_ptr():#x}, no multiple of {ALIGNMENT}")
    query = in_place(query)
    num_tokens, num_heads, head_dim = query.shape
    block_size, num_kv_heads = kv.shape[2], kv.shape[3]
    share = num_heads // num_kv_heads
    share_rows = triton.next_power_of_2(share)
    tiles = tiles or segment_tiles(head_dim, query.element_size())
    rows = max(tiles.rows, share_rows)
    num_segments = max(1, triton.cdiv(batch.block_tables.shape[1] * block_size, segment))
    num_tiles = num_tokens // (rows // share_rows) + batch.num_sequences
    fitting = workspace_nbytes // (num_heads * num_segments * (head_dim + 2) * 4)
    step = max(_STEP, min(fitting, num_tokens + _STEP) // _STEP * _STEP)
    out = torch.empty_like(query)
    shape = (min(step, num_tokens), num_heads, num_segments)
    partial = torch.empty(*shape, head_dim, dtype=torch.float32, device=query.device)
    stats = torch.empty(*shape, 2, dtype=torch.float32, device=query.device)
    for first in range(0, num_tokens, step):
        count = min(step, num_tokens - first)
        segment_kernel[(num_tiles, num_kv_heads, num_segments)](
            *(query, kv, partial, stats, batch.query_starts, batch.context_lens, batch.block_tables),
            *(batch.block_tables.stride(0), scale * math.log2(math.e), batch.num_sequences),
            *(first, first + count, sliding_window or 0, block_size, num_kv_heads, head_dim),
            *(padded(head_dim), share, share_rows, rows, tiles.keys, segment),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            **OPTIONS,
        )
        reduce_kernel[(count, num_heads)](
            *(partial, stats, out[first:], out.stride(0), num_segments, head_dim, padded(head_dim), MERGED),
            num_warps=4,
            **OPTIONS,
        )
    return out
