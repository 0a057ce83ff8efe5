"""Triton attention on a GPU against the oracle, eager and from a captured graph with other lengths."""

from __future__ import annotations

import random

import pytest
import torch

from microserve.kernels.attention.gpu_attention import DeviceBatch, paged_attention
from tests.support.engine.device.kernel_cases import AttentionCase
from tests.support.engine.device.pairwise import pairwise

pytest.importorskip("triton", reason="no triton")

BOUNDS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


GROUPS = [(1, None), (3, None), (4, 50), (8, None)]
"""Heads of a query for one of a key, and a window."""


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group"), pairwise(list(BOUNDS), [64, 80, 96, 128, 256], GROUPS)
)
@pytest.mark.parametrize("num_splits", [None, 7])
def test_mixed_batches_equal_the_oracle(
    gpu: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    group: tuple[int, int | None],
    num_splits: int | None,
) -> None:
    share, window = group
    spans = [(100, 190), (33, 33), (1, 77), (0, 0)]
    case = AttentionCase(16, 2, share, head_dim, window, [300, 1, 0, 129], spans, head_dim)
    work = case.build(dtype, str(gpu))
    out = torch.full_like(work.query, float("nan"))
    options = {"scale": head_dim**-0.5, "sliding_window": window}
    paged_attention(work.query, work.kv, work.batch, num_splits=num_splits, out=out, **options)
    want = work.expected(head_dim**-0.5, window)
    bound = BOUNDS[dtype]
    torch.testing.assert_close(out.cpu().float(), want.float(), atol=bound, rtol=bound)


def test_a_captured_graph_serves_other_lengths_and_tables(gpu: torch.device) -> None:
    chance = random.Random(1)
    held: DeviceBatch | None = None
    graph = torch.cuda.CUDAGraph()
    for round_ in range(5):
        contexts = [chance.randint(0, 400) for _ in range(7)] + [400]
        work = AttentionCase(16, 2, 4, 128, None, contexts, [], round_).build(torch.bfloat16, str(gpu))
        if held is None:
            query = torch.empty_like(work.query)
            kv = torch.empty(8 * 25 + 1, 2, 16, 2, 128, dtype=torch.bfloat16, device=gpu)
            held = work.batch
        query.copy_(work.query)
        kv[: work.kv.shape[0]] = work.kv
        held.context_lens.copy_(work.batch.context_lens)
        held.block_tables.copy_(work.batch.block_tables)
        if round_ == 0:
            paged_attention(query, kv, held, scale=0.1)  # compiled before it is captured
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                out = paged_attention(query, kv, held, scale=0.1)
        out.fill_(float("nan"))
        graph.replay()
        want = work.expected(0.1, None)
        torch.testing.assert_close(out.cpu().float(), want.float(), atol=3e-2, rtol=3e-2)
