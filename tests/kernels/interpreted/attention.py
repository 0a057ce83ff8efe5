"""The Triton attention kernels, interpreted, against the oracle over random batches.

fp32 and fp16: for bf16 the interpreter multiplies bit patterns, so that runs on a GPU only.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from microserve.kernels.attention.triton_attention import Tiles, launch_decode, launch_prefill
from tests.support.engine.device.kernel_cases import AttentionCase

SMALL = Tiles(rows=16, keys=16, num_warps=4, num_stages=2)
"""Contexts of some tens of tokens then have many steps, whole and partial."""

contexts = st.integers(0, 90)
prefills = st.integers(1, 40).flatmap(lambda new: st.tuples(st.just(new), st.integers(new, new + 40)))
cases = st.builds(
    AttentionCase,
    block_size=st.sampled_from([1, 4, 16]),
    num_kv_heads=st.integers(1, 2),
    share=st.integers(1, 5),
    head_dim=st.sampled_from([4, 16, 24]),
    window=st.none() | st.integers(1, 60),
    decodes=st.lists(contexts, max_size=3),
    prefills=st.lists(prefills | st.just((0, 0)), max_size=3),
    seed=st.integers(0, 2**32),
).filter(lambda case: case.decodes or case.prefills)


def check(case: AttentionCase, dtype: torch.dtype, num_splits: int, tiles: Tiles | None) -> None:
    work = case.build(dtype)
    batch = work.batch
    out = torch.full_like(work.query, float("nan"))
    if case.decodes:
        launch_decode(
            *(work.query, work.kv, out, batch.context_lens, batch.block_tables),
            num_decodes=batch.num_decodes,
            num_splits=num_splits,
            scale=0.3,
            window=case.window or 0,
            tiles=tiles,
        )
    if case.prefills:
        launch_prefill(
            *(work.query, work.kv, out, batch.query_starts, batch.context_lens, batch.block_tables),
            first_sequence=batch.num_decodes,
            scale=0.3,
            window=case.window or 0,
            tiles=tiles,
        )
    bound = 1e-5 if dtype == torch.float32 else 4e-3
    want = work.expected(0.3, case.window)
    torch.testing.assert_close(out.float(), want.float(), atol=bound, rtol=bound)


@settings(deadline=None, max_examples=40, phases=[Phase.generate])  # to shrink a case takes minutes
@given(case=cases, num_splits=st.integers(1, 20))
def test_every_batch_equals_the_oracle(case: AttentionCase, num_splits: int) -> None:
    check(case, torch.float32, num_splits, SMALL)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("window", [None, 33])
def test_head_dims_in_use_with_the_tiles_in_use(head_dim: int, window: int | None) -> None:
    case = AttentionCase(16, 1, 3, head_dim, window, [130, 1, 0], [(100, 140), (2, 2)], 5)
    check(case, torch.float16, 3, None)


def test_all_tokens_of_a_decode_batch_may_be_prefilled_too() -> None:
    """A caller that does not sort its batch declares no decodes, and any sequence may have one token."""
    prefills = [(1, 30), (20, 20), (1, 1), (1, 77)]
    check(AttentionCase(4, 2, 2, 16, None, [], prefills, 3), torch.float32, 1, SMALL)


def test_more_splits_than_rows_leave_nothing_behind() -> None:
    check(AttentionCase(4, 1, 4, 16, None, [3, 40, 0], [], 3), torch.float32, 64, SMALL)


def test_one_head_of_many_queries_fills_more_than_a_tile() -> None:
    check(AttentionCase(4, 1, 24, 16, None, [30, 5], [(7, 30)], 3), torch.float32, 2, SMALL)
