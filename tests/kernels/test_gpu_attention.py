"""Attention over a device batch: on a CPU the same calls with the same answers, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.kernels.attention.gpu_attention import DeviceBatch, paged_attention, split_count
from tests.support.engine.device.kernel_cases import AttentionCase, AttentionWork

cases = st.builds(
    AttentionCase,
    block_size=st.sampled_from([1, 4, 16]),
    num_kv_heads=st.integers(1, 2),
    share=st.integers(1, 3),
    head_dim=st.sampled_from([4, 16]),
    window=st.none() | st.integers(1, 60),
    decodes=st.lists(st.integers(0, 60), max_size=3),
    prefills=st.lists(st.just((0, 0)) | st.tuples(st.integers(1, 20), st.integers(20, 60)), max_size=3),
    seed=st.integers(0, 2**32),
)


@settings(deadline=None)
@given(case=cases, num_splits=st.none() | st.integers(1, 9))
def test_on_a_cpu_every_batch_equals_the_oracle(case: AttentionCase, num_splits: int | None) -> None:
    if not case.decodes and not case.prefills:
        return
    work = case.build(torch.float32)
    options: dict[str, Any] = {"scale": 0.3, "sliding_window": case.window, "num_splits": num_splits}
    got = paged_attention(work.query, work.kv, work.batch, **options)
    want = work.expected(0.3, case.window)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    out = torch.full_like(want, float("nan"))
    assert paged_attention(work.query, work.kv, work.batch, out=out, **options) is out
    assert torch.equal(out, got)


def sample() -> AttentionWork:
    return AttentionCase(4, 2, 2, 8, None, [9, 3], [(3, 7)], 1).build(torch.float32)


def test_one_decode_of_a_long_context_is_split_and_a_full_batch_is_not() -> None:
    # 132 multiprocessors, 8 KV heads.
    assert split_count(8, 32768, 132) == 128  # as short as a split may be
    assert split_count(64, 32768, 132) == 17
    assert split_count(256 * 8, 32768, 132) == 1
    assert split_count(8, 100, 132) == 1


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (torch.zeros(5, 3, 8), "does not fit kv"),
        (torch.zeros(5, 4, 4), "does not fit kv"),
        (torch.zeros(5, 4, 16)[:, :, :8], "query has strides"),
        (torch.zeros(5, 4, 8).double(), "query is torch.float64"),
        (torch.zeros(5, 4, 8).half(), "query is torch.float16 and kv torch.float32"),
        (torch.zeros(5, 4, 8, device="meta"), "kv is on cpu, query on meta"),
        (torch.zeros(1, 4, 8), "batch.num_decodes 2 exceeds"),
    ],
)
def test_a_query_that_does_not_fit_is_refused(query: torch.Tensor, message: str) -> None:
    work = sample()
    with pytest.raises(ValueError, match=message):
        paged_attention(query, work.kv, work.batch, scale=1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_lens": torch.zeros(3).long()}, "batch.context_lens is torch.int64"),
        ({"query_starts": torch.zeros(3).int()}, r"batch.query_starts is torch.int32 \(3,\), int32 \(4,\)"),
        ({"block_tables": torch.zeros(2, 4).int()}, "batch.block_tables is"),
        ({"block_tables": torch.zeros(3).int()}, "batch.block_tables is"),
        ({"block_tables": torch.zeros(4, 3).int().T}, "batch.block_tables on cpu must be contiguous"),
        ({"num_decodes": 4}, "batch.num_decodes 4 exceeds 3 sequences"),
        ({"num_decodes": -1}, "batch.num_decodes -1"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    work = sample()
    batch: DeviceBatch = replace(work.batch, **changes)
    with pytest.raises(ValueError, match=message):
        paged_attention(work.query, work.kv, batch, scale=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sliding_window": 0}, "sliding_window 0"),
        ({"num_splits": 0}, "num_splits 0"),
        ({"out": torch.zeros(4, 4, 8)}, "out is"),
        ({"out": torch.zeros(5, 4, 16)[:, :, ::2]}, "out has strides"),
        ({"kv": torch.zeros(5, 2, 4, 2, 16)[..., :8]}, "kv is"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    work = sample()
    given: dict[str, Any] = {
        "query": work.query,
        "kv": work.kv,
        "batch": work.batch,
        "scale": 1.0,
    } | arguments
    with pytest.raises(ValueError, match=message):
        paged_attention(**given)
