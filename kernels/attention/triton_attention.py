"""Paged attention in Triton: prefill tiles, and decode with the context split over thread blocks.

Owns the kernels, their tile sizes and their launches. Must not know what a batch means (``gpu_attention.py``,
which also checks it and is what callers use), models or schedulers. Needs Triton to be imported.

Nothing here waits for the device or reads from it: grids are upper bounds, lengths are read on the device,
and programs that turn out to have no work return. So a launch can be captured in a CUDA graph and replayed
with other lengths, tables and slots.
"""

# Triton publishes no types, and a kernel's arguments are not Python values.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from microserve.kernels.triton_address import key_row


class Tiles(NamedTuple):
    """One kernel's tile and how it is executed."""

    rows: int
    """Rows of the query tile, (token, head) pairs: a power of two, at least 16."""
    keys: int
    """Keys of one step along the context: a power of two, at least 16."""
    num_warps: int
    num_stages: int


@triton.jit
def attend(
    query,
    total,
    peak,
    weight,
    kv,
    table,
    positions,
    begin,
    end,
    scale,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Online softmax over keys [begin, end): (total [rows, DIM], peak [rows], weight [rows]) after them.

    kv: the KV head's first value in block 0; table: the sequence's blocks; positions: [rows], of the queries.
    MASKED: a query sees no key after its own, nor one WINDOW or more before it. Else all keys are seen and
    end - begin is a multiple of KEYS.
    """
    dims = tl.arange(0, DIM)
    for start in range(begin, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        if MASKED:
            held = keys < end
            blocks = tl.load(table + keys // BLOCK_SIZE, mask=held, other=0).to(tl.int64)
        else:
            held = keys >= 0
            blocks = tl.load(table + keys // BLOCK_SIZE).to(tl.int64)
        offsets = key_row(blocks, keys % BLOCK_SIZE, BLOCK_SIZE) * ROW
        # Rows past the end are not read: a stray NaN there survives a weight of 0.
        if MASKED or HEAD_DIM != DIM:
            there = held[:, None] & (dims < HEAD_DIM)[None, :]
            across = held[None, :] & (dims < HEAD_DIM)[:, None]
            key = tl.load(kv + offsets[None, :] + dims[:, None], mask=across, other=0.0)
            value = tl.load(kv + BLOCK_SIZE * ROW + offsets[:, None] + dims[None, :], mask=there, other=0.0)
        else:
            key = tl.load(kv + offsets[None, :] + dims[:, None])
            value = tl.load(kv + BLOCK_SIZE * ROW + offsets[:, None] + dims[None, :])
        scores = tl.dot(query, key, input_precision="ieee") * scale
        if MASKED:
            seen = held[None, :] & (keys[None, :] <= positions[:, None])
            if WINDOW > 0:
                seen = seen & (keys[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        # A row that has seen nothing so far must stay 0, not become exp2(-inf + inf).
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        shares = tl.exp2(scores - finite[:, None])
        fade = tl.exp2(peak - finite)
        weight = weight * fade + tl.sum(shares, 1)
        total = tl.dot(shares.to(value.dtype), value, total * fade[:, None], input_precision="ieee")
        peak = higher
    return total, peak, weight


@triton.jit
def find_tile(query_starts, tile, first_sequence, num_sequences, TOKENS: tl.constexpr):
    """(sequence, the packed query's row of its first new token, its new tokens, the tile's first of them).

    Sequence s may have up to ``floor(last / TOKENS) - floor(first / TOKENS) + 1`` tiles, first and last its
    places in the packed query: never less than it needs, and a sum that needs no prefix over sequences.
    """
    base = tl.load(query_starts + first_sequence)
    low, high = first_sequence, first_sequence + num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        before = (tl.load(query_starts + middle) - base) // TOKENS + middle - first_sequence
        if before <= tile:
            low = middle
        else:
            high = middle
    begin = tl.load(query_starts + low)
    query_len = tl.load(query_starts + low + 1) - begin
    return low, begin, query_len, (tile - ((begin - base) // TOKENS + low - first_sequence)) * TOKENS


@triton.jit(do_not_specialize=["table_stride", "first_sequence", "num_sequences"])
def prefill_kernel(
    query,
    kv,
    out,
    query_starts,
    context_lens,
    block_tables,
    query_stride,
    out_stride,
    table_stride,
    scale,
    first_sequence,
    num_sequences,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SHARE: tl.constexpr,
    SHARE_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One tile of TOKENS query tokens of one sequence, and all query heads of one KV head.

    Row r of the tile is token ``r // SHARE_ROWS`` and query head ``r % SHARE_ROWS`` of the KV head's SHARE.
    """
    TOKENS: tl.constexpr = ROWS // SHARE_ROWS
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest contexts first: no long tail
    kv_head = tl.program_id(1)

    low, begin, query_len, first = find_tile(query_starts, tile, first_sequence, num_sequences, TOKENS)
    if first >= query_len:
        return

    context_len = tl.load(context_lens + low)
    rows = tl.arange(0, ROWS)
    tokens = first + rows // SHARE_ROWS
    heads = rows % SHARE_ROWS
    dims = tl.arange(0, DIM)
    there = ((tokens < query_len) & (heads < SHARE))[:, None] & (dims < HEAD_DIM)[None, :]
    in_token = ((kv_head * SHARE + heads) * HEAD_DIM)[:, None] + dims[None, :]
    places = (begin + tokens).to(tl.int64)[:, None]
    queries = tl.load(query + places * query_stride + in_token, mask=there, other=0.0)

    positions = context_len - query_len + tokens
    earliest = context_len - query_len + first
    end = tl.minimum(earliest + TOKENS, context_len)
    total = tl.zeros([ROWS, DIM], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    head = kv + kv_head * HEAD_DIM
    table = block_tables + low.to(tl.int64) * table_stride
    if WINDOW > 0:
        masked_from = tl.maximum(earliest - WINDOW + 1, 0)
    else:
        masked_from = (earliest + 1) // KEYS * KEYS
        total, peak, weight = attend(
            *(queries, total, peak, weight, head, table, positions, 0, masked_from, scale),
            *(False, WINDOW, BLOCK_SIZE, NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, DIM, KEYS),
        )
    total, peak, weight = attend(
        *(queries, total, peak, weight, head, table, positions, masked_from, end, scale),
        *(True, WINDOW, BLOCK_SIZE, NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, DIM, KEYS),
    )
    mixed = total / tl.where(weight > 0.0, weight, 1.0)[:, None]
    tl.store(out + places * out_stride + in_token, mixed.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["table_stride"])
def decode_kernel(
    query,
    kv,
    out,
    partial,
    stats,
    context_lens,
    block_tables,
    query_stride,
    out_stride,
    table_stride,
    scale,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SHARE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One split of one sequence's context, and all query heads of one KV head.

    Not SPLIT: straight to ``out``. Else to partial [sequence, head, split, HEAD_DIM] fp32, undivided, and
    stats [sequence, head, split, 2] fp32: the peak of the scores in powers of two, and the weight.
    """
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    sequence = tl.program_id(2).to(tl.int64)

    context_len = tl.load(context_lens + sequence)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(context_len - WINDOW, 0)
    length = tl.cdiv(tl.cdiv(context_len - begin, KEYS), num_splits) * KEYS
    begin += split * length
    end = tl.minimum(begin + length, context_len)
    whole = begin + tl.maximum(end - begin, 0) // KEYS * KEYS

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    there = (rows < SHARE)[:, None] & (dims < HEAD_DIM)[None, :]
    heads = kv_head * SHARE + rows
    in_token = (heads * HEAD_DIM)[:, None] + dims[None, :]
    queries = tl.load(query + sequence * query_stride + in_token, mask=there, other=0.0)
    total = tl.zeros([ROWS, DIM], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    positions = tl.zeros([ROWS], tl.int32) + context_len - 1
    head = kv + kv_head * HEAD_DIM
    table = block_tables + sequence * table_stride
    total, peak, weight = attend(
        *(queries, total, peak, weight, head, table, positions, begin, whole, scale),
        *(False, 0, BLOCK_SIZE, NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, DIM, KEYS),
    )
    total, peak, weight = attend(
        *(queries, total, peak, weight, head, table, positions, whole, end, scale),
        *(True, 0, BLOCK_SIZE, NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, DIM, KEYS),
    )
    if SPLIT:
        place = (sequence * (NUM_KV_HEADS * SHARE) + heads) * num_splits + split
        tl.store(stats + place * 2, peak, mask=rows < SHARE)
        tl.store(stats + place * 2 + 1, weight, mask=rows < SHARE)
        worked = there & (peak > float("-inf"))[:, None]
        tl.store(partial + place[:, None] * HEAD_DIM + dims[None, :], total, mask=worked)
    else:
        mixed = total / tl.where(weight > 0.0, weight, 1.0)[:, None]
        tl.store(out + sequence * out_stride + in_token, mixed.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["num_splits"])
def reduce_kernel(
    partial,
    stats,
    out,
    out_stride,
    num_splits,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The splits of one sequence and head, CHUNK of them at a time, into the output."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = (sequence * tl.num_programs(1) + head) * num_splits
    dims = tl.arange(0, DIM)
    total = tl.zeros([DIM], tl.float32)
    top = float("-inf")
    weight = 0.0
    for start in range(0, num_splits, CHUNK):
        splits = start + tl.arange(0, CHUNK)
        held = splits < num_splits
        peaks = tl.load(stats + (first + splits) * 2, mask=held, other=float("-inf"))
        weights = tl.load(stats + (first + splits) * 2 + 1, mask=held, other=0.0)
        worked = peaks > float("-inf")
        there = worked[:, None] & (dims < HEAD_DIM)[None, :]
        parts = tl.load(partial + (first + splits)[:, None] * HEAD_DIM + dims[None, :], mask=there, other=0.0)
        higher = tl.maximum(top, tl.max(peaks, 0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        shares = tl.exp2(peaks - finite)
        fade = tl.exp2(top - finite)
        total = total * fade + tl.sum(parts * shares[:, None], 0)
        weight = weight * fade + tl.sum(weights * shares, 0)
        top = higher
    mixed = total / tl.where(weight > 0.0, weight, 1.0)
    place = sequence * out_stride + head * HEAD_DIM + dims
    tl.store(out + place, mixed.to(out.dtype.element_ty), mask=dims < HEAD_DIM)


def prefill_tiles(head_dim: int, element_nbytes: int) -> Tiles:
    """What fits 99 KiB of shared memory, the least of all devices since sm_80 (a test compiles each)."""
    dim = padded(head_dim)
    if element_nbytes == 4:  # no matrix units at full precision: small tiles keep the code short
        return Tiles(32, 32, 4, 2) if dim <= 128 else Tiles(16, 16, 4, 2)
    if dim <= 64:
        return Tiles(128, 64, 4, 3)
    return Tiles(128, 64, 8, 2) if dim <= 128 else Tiles(64, 32, 4, 2)


def decode_tiles(head_dim: int, element_nbytes: int) -> Tiles:
    """As ``prefill_tiles``; ``rows`` is the least that a matrix product takes."""
    wide = padded(head_dim) * element_nbytes
    if wide <= 256:
        return Tiles(16, 64, 4, 3)
    if wide <= 512:
        return Tiles(16, 32, 4, 3)
    return Tiles(16, 16, 4, 3)


def padded(head_dim: int) -> int:
    """The power of two that a tile is wide."""
    return max(16, int(triton.next_power_of_2(head_dim)))


def launch_prefill(
    query: Tensor,
    kv: Tensor,
    out: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    *,
    first_sequence: int,
    scale: float,
    window: int,
    tiles: Tiles | None = None,
) -> None:
    """Sequences [first_sequence, len(context_lens)); window 0: none. Arguments as in ``gpu_attention``."""
    num_heads, head_dim = query.shape[1:]
    block_size, num_kv_heads = kv.shape[2], kv.shape[3]
    share = num_heads // num_kv_heads
    share_rows = triton.next_power_of_2(share)
    if tiles is None:
        tiles = prefill_tiles(head_dim, query.element_size())
    rows = max(tiles.rows, share_rows)
    num_sequences = context_lens.shape[0] - first_sequence
    num_tiles = (query.shape[0] - first_sequence) // (rows // share_rows) + num_sequences
    prefill_kernel[(num_tiles, num_kv_heads)](
        *(query, kv, out, query_starts, context_lens, block_tables),
        *(query.stride(0), out.stride(0), block_tables.stride(0)),
        *(scale * math.log2(math.e), first_sequence, num_sequences),
        *(window, block_size, num_kv_heads, head_dim, padded(head_dim), share, share_rows, rows, tiles.keys),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def launch_decode(
    query: Tensor,
    kv: Tensor,
    out: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    *,
    num_decodes: int,
    num_splits: int,
    scale: float,
    window: int,
    tiles: Tiles | None = None,
) -> None:
    """Sequences [0, num_decodes), one query token each; arguments as in ``gpu_attention``."""
    num_heads, head_dim = query.shape[1:]
    block_size, num_kv_heads = kv.shape[2], kv.shape[3]
    share = num_heads // num_kv_heads
    if tiles is None:
        tiles = decode_tiles(head_dim, query.element_size())
    rows = max(tiles.rows, triton.next_power_of_2(share))
    partial, stats = out, out  # never touched without a split
    if num_splits > 1:
        shape = (num_decodes, num_heads, num_splits)
        partial = torch.empty(*shape, head_dim, dtype=torch.float32, device=query.device)
        stats = torch.empty(*shape, 2, dtype=torch.float32, device=query.device)
    decode_kernel[(num_kv_heads, num_splits, num_decodes)](
        *(query, kv, out, partial, stats, context_lens, block_tables),
        *(query.stride(0), out.stride(0), block_tables.stride(0), scale * math.log2(math.e)),
        *(window, block_size, num_kv_heads, head_dim, padded(head_dim), share, rows, tiles.keys),
        num_splits > 1,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if num_splits > 1:
        reduce_kernel[(num_decodes, num_heads)](
            *(partial, stats, out, out.stride(0), num_splits, head_dim, padded(head_dim), 16), num_warps=4
        )
