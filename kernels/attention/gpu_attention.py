"""Paged attention over a batch whose lengths live on the device: prefill, decode and both at once.

Owns what a batch is, its checks, and the number of splits; ``triton_attention.py`` executes it on CUDA and
``paged_attention.py`` on a CPU, where the same calls work for whoever tests a caller. Must not know models,
schedulers or who owns the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from microserve.kernels import cuda_module
from microserve.kernels.attention import paged_attention as cpu
from microserve.kernels.attention.paged_attention import AttentionPlan, Span

THREAD_BLOCKS_PER_MULTIPROCESSOR = 8
"""Aimed at by splitting: a few rounds of thread blocks, so that uneven contexts even out."""
MIN_SPLIT_TOKENS = 256
"""Shorter splits would spend their time on being combined."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """The sequences of one step. All tensors are int32, contiguous and on the query's device; their sizes are
    upper bounds, so that a captured graph serves any batch that fits: what they hold may change between
    replays, and nothing on the host depends on it.

    A place without a sequence has a context of 0 and repeats the start before it.
    """

    query_starts: Tensor
    """[num_sequences + 1]: sequence s has the new tokens [query_starts[s], query_starts[s + 1]) of the
    packed query."""
    context_lens: Tensor
    """[num_sequences]: tokens in the cache once the new ones are written."""
    block_tables: Tensor
    """[num_sequences, max_blocks]: blocks of tokens [0, context_len) in order; what follows is not read."""
    num_decodes: int
    """The first so many places have exactly one token of the query each (a place without a sequence too, at
    its own index) and are worked on split by split; the others may have any number."""

    @property
    def num_sequences(self) -> int:
        return self.context_lens.shape[0]


def paged_attention(
    query: Tensor,
    kv: Tensor,
    batch: DeviceBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    num_splits: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend from the new tokens to all that stands in their sequences' blocks (write first).

    query: [num_tokens, num_heads, head_dim], fp32, fp16 or bf16, where a token's heads lie side by side and
    num_heads is a multiple of num_kv_heads; num_tokens is at least ``query_starts[-1]``. kv: one layer,
    [num_blocks, 2, block_size, num_kv_heads, head_dim], contiguous, of the query's dtype. The token at
    position p sees [0, p], or (p - sliding_window, p]. num_splits: of each decoding sequence's context; None:
    what fills the device for ``max_blocks``. Returns ``out`` or a tensor like ``query``; decoding places
    without a sequence are zeros, rows past the last sequence hold anything.

    No synchronisation with the device; on CUDA the first call for a model compiles, so it must come before a
    capture. Raises ``ValueError`` naming the argument.
    """
    check_batch(query, kv, batch)
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window {sliding_window} must be at least 1")
    if num_splits is not None and not 1 <= num_splits < 1 << 16:
        raise ValueError(f"num_splits {num_splits} is outside [1, 65535]")
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    elif (out.shape, out.dtype, out.device) != (query.shape, query.dtype, query.device):
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)} on {out.device}, unlike query")
    elif not _heads_together(out):
        raise ValueError(f"out has strides {out.stride()}: a token's heads must lie side by side")
    if not query.is_cuda:
        return _attend_on_cpu(query, kv, batch, out, scale, sliding_window)
    with torch.cuda.device(query.device):  # Triton launches on the current one
        _attend_on_cuda(query, kv, batch, out, scale, sliding_window, num_splits)
    return out


def _attend_on_cuda(
    query: Tensor,
    kv: Tensor,
    batch: DeviceBatch,
    out: Tensor,
    scale: float,
    sliding_window: int | None,
    num_splits: int | None,
) -> None:
    from microserve.kernels.attention import triton_attention

    window = sliding_window or 0
    if batch.num_decodes:
        if num_splits is None:
            max_context = batch.block_tables.shape[1] * kv.shape[2]
            num_splits = split_count(
                batch.num_decodes * kv.shape[3],
                min(max_context, sliding_window or max_context),
                cuda_module.num_multiprocessors(query.device),
            )
        triton_attention.launch_decode(
            *(query, kv, out, batch.context_lens, batch.block_tables),
            num_decodes=batch.num_decodes,
            num_splits=num_splits,
            scale=scale,
            window=window,
        )
    if batch.num_sequences > batch.num_decodes:
        triton_attention.launch_prefill(
            *(query, kv, out, batch.query_starts, batch.context_lens, batch.block_tables),
            first_sequence=batch.num_decodes,
            scale=scale,
            window=window,
        )


def split_count(num_heads: int, max_context: int, num_multiprocessors: int) -> int:
    """Splits of each context, for ``num_heads`` pairs of a sequence and a KV head."""
    filling = -(-num_multiprocessors * THREAD_BLOCKS_PER_MULTIPROCESSOR // num_heads)
    return max(1, min(filling, max_context // MIN_SPLIT_TOKENS))


def check_batch(query: Tensor, kv: Tensor, batch: DeviceBatch) -> None:
    """Raises ``ValueError`` for what ``paged_attention`` does not take."""
    if kv.dim() != 5 or kv.shape[1] != 2 or not kv.is_contiguous():
        raise ValueError(
            f"kv is {tuple(kv.shape)}, [num_blocks, 2, block_size, num_kv_heads, head_dim], contiguous, is"
            " needed"
        )
    if query.dim() != 3 or query.shape[1] % kv.shape[3] or query.shape[2] != kv.shape[4]:
        raise ValueError(f"query {tuple(query.shape)} does not fit kv {tuple(kv.shape)}")
    if not _heads_together(query):
        raise ValueError(f"query has strides {query.stride()}: a token's heads must lie side by side")
    if query.dtype not in _DTYPES or kv.dtype != query.dtype:
        raise ValueError(f"query is {query.dtype} and kv {kv.dtype}: both must be one of {_DTYPES}")
    if kv.device != query.device:
        raise ValueError(f"kv is on {kv.device}, query on {query.device}")
    num_sequences = batch.num_sequences
    shapes = {
        "query_starts": (num_sequences + 1,),
        "context_lens": (num_sequences,),
        "block_tables": (num_sequences, *batch.block_tables.shape[-1:]),
    }
    for name, shape in shapes.items():
        tensor: Tensor = getattr(batch, name)
        if tensor.dtype != torch.int32 or tensor.shape != shape:
            raise ValueError(f"batch.{name} is {tensor.dtype} {tuple(tensor.shape)}, int32 {shape} is needed")
        if not tensor.is_contiguous() or tensor.device != query.device:
            raise ValueError(f"batch.{name} on {tensor.device} must be contiguous and on {query.device}")
    if not 0 <= batch.num_decodes <= min(num_sequences, query.shape[0], 65535):
        raise ValueError(
            f"batch.num_decodes {batch.num_decodes} exceeds {num_sequences} sequences, {query.shape[0]} rows"
            " or 65535"
        )


def _heads_together(tokens: Tensor) -> bool:
    return tokens[:1].is_contiguous()


def _attend_on_cpu(
    query: Tensor, kv: Tensor, batch: DeviceBatch, out: Tensor, scale: float, window: int | None
) -> Tensor:
    starts, contexts = batch.query_starts.tolist(), batch.context_lens.tolist()
    spans: list[Span] = []
    kept: list[int] = []
    for sequence, context_len in enumerate(contexts):
        begin, end = starts[sequence], starts[sequence + 1]
        if sequence < batch.num_decodes:
            begin, end = sequence, sequence + 1
        if context_len == 0:
            out[begin:end] = 0.0
        elif end > begin:
            spans.append(Span(end - begin, context_len, batch.block_tables[sequence].tolist()))
            kept += range(begin, end)
    if spans:
        rows = torch.tensor(kept)
        plan = AttentionPlan(spans, kv)
        mixed = cpu.paged_attention(query[rows], kv, plan, scale=scale, sliding_window=window)
        out[rows] = mixed
    return out
