"""The fast paged attention against the oracle, over random batches, block tables and windows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from microserve.kernels import reference
from microserve.kernels.attention import attention_plan
from microserve.kernels.attention import paged_attention as fast
from microserve.kernels.attention.paged_attention import AttentionPlan, KvWrite, Span, Workspace


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    block_size: int
    num_kv_heads: int
    share: int
    head_dim: int
    window: int | None
    spans: list[tuple[int, int]]
    shuffled: bool
    seed: int

    def build(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Span]]:
        """(query, kv, spans). Rows that belong to no sequence hold NaN, which must reach no result."""
        generator = torch.Generator().manual_seed(self.seed)
        size = self.block_size
        needed = [-(-context // size) for _, context in self.spans]
        num_blocks = sum(needed) + 1
        order = torch.randperm(num_blocks, generator=generator) if self.shuffled else torch.arange(num_blocks)
        free = iter(order.tolist())
        kv = torch.full((num_blocks, 2, size, self.num_kv_heads, self.head_dim), float("nan"), dtype=dtype)
        spans = []
        for (query_len, context), blocks in zip(self.spans, needed, strict=True):
            table = list(itertools.islice(free, blocks))
            for position in range(context):
                row = torch.randn(2, self.num_kv_heads, self.head_dim, generator=generator)
                kv[table[position // size], :, position % size] = row.to(dtype)
            spans.append(Span(query_len, context, table))
        num_tokens = sum(query_len for query_len, _ in self.spans)
        query = torch.randn(num_tokens, self.num_kv_heads * self.share, self.head_dim, generator=generator)
        return query.to(dtype), kv, spans


def span_lengths() -> st.SearchStrategy[tuple[int, int]]:
    decode = st.tuples(st.just(1), st.integers(1, 70))
    prefill = st.integers(1, 40).flatmap(lambda new: st.tuples(st.just(new), st.integers(new, new + 40)))
    return st.one_of(decode, prefill)


cases = st.builds(
    Case,
    block_size=st.sampled_from([1, 4, 16]),
    num_kv_heads=st.integers(1, 3),
    share=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8]),
    window=st.none() | st.integers(1, 80),
    spans=st.lists(span_lengths(), min_size=1, max_size=5),
    shuffled=st.booleans(),
    seed=st.integers(0, 2**32),
)


@settings(deadline=None)
@given(cases)
def test_equals_reference(case: Case) -> None:
    query, kv, spans = case.build(torch.float32)
    scale = case.head_dim**-0.5
    got = fast.paged_attention(query, kv, AttentionPlan(spans, kv), scale=scale, sliding_window=case.window)
    want = reference.paged_attention(query, kv, spans, scale=scale, sliding_window=case.window)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 19])
def test_half_precision_stays_close(dtype: torch.dtype, window: int | None) -> None:
    lengths = [(1, 130), (1, 3), (100, 140), (1, 131), (2, 2)]
    query, kv, spans = Case(16, 3, 3, 16, window, lengths, True, 5).build(dtype)
    got = fast.paged_attention(query, kv, AttentionPlan(spans, kv), scale=0.25, sliding_window=window)
    want = reference.paged_attention(query, kv, spans, scale=0.25, sliding_window=window)
    torch.testing.assert_close(got.float(), want.float(), atol=0.04, rtol=0.02)


def test_one_plan_and_workspace_serve_layers_with_and_without_a_window() -> None:
    lengths = [(1, 60), (1, 33), (40, 64), (1, 2)]
    workspace = Workspace()
    for seed in range(3):
        query, kv, spans = Case(16, 2, 2, 8, None, lengths[seed:], True, seed).build(torch.float32)
        plan = AttentionPlan(spans, kv)
        for window in (None, 7, None, 1000):
            got = fast.paged_attention(query, kv, plan, scale=0.3, sliding_window=window, workspace=workspace)
            want = reference.paged_attention(query, kv, spans, scale=0.3, sliding_window=window)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_workspace_made_in_inference_mode_serves_outside_of_it() -> None:
    workspace = Workspace()
    query, kv, spans = Case(16, 2, 2, 8, None, [(1, 60), (3, 9)], True, 0).build(torch.float32)
    with torch.inference_mode():
        inside = fast.paged_attention(query, kv, AttentionPlan(spans, kv), scale=0.3, workspace=workspace)
    outside = fast.paged_attention(query, kv, AttentionPlan(spans, kv), scale=0.3, workspace=workspace)
    torch.testing.assert_close(inside.clone(), outside, atol=0, rtol=0)


def test_one_long_context_does_not_pad_the_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_plan, "PADDING_NBYTES", 64 * 2 * 8 * 4)  # 64 rows of padding a group
    query, kv, spans = Case(
        16, 1, 1, 8, None, [(1, 20), (1, 900), (1, 24), (1, 17), (1, 940)], True, 3
    ).build(torch.float32)
    plan = AttentionPlan(spans, kv)
    groups, _ = plan.layout(None)
    tokens = [group.tokens.tolist() for group in groups if group.tokens is not None]
    assert tokens == [[0, 2, 3], [1, 4]]
    assert [group.gather.length for group in groups] == [24, 940]
    got = fast.paged_attention(query, kv, plan, scale=0.3)
    torch.testing.assert_close(got, reference.paged_attention(query, kv, spans, scale=0.3))


def test_groups_stay_inside_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_plan, "GROUP_NBYTES", 100 * 2 * 8 * 4)  # 100 rows a group
    query, kv, spans = Case(16, 1, 1, 8, None, [(1, 40)] * 5 + [(1, 200)], True, 3).build(torch.float32)
    plan = AttentionPlan(spans, kv)
    groups, _ = plan.layout(None)
    assert [group.gather.num_sequences for group in groups] == [2, 2, 1, 1]
    got = fast.paged_attention(query, kv, plan, scale=0.3)
    torch.testing.assert_close(got, reference.paged_attention(query, kv, spans, scale=0.3))


def test_a_window_gathers_only_the_blocks_it_sees() -> None:
    _, kv, spans = Case(16, 1, 1, 8, None, [(1, 500), (32, 500)], True, 3).build(torch.float32)
    groups, chunks = AttentionPlan(spans, kv).layout(16)
    assert groups[0].gather.halves.numel() == 2 * 2  # rows 484..499 lie in two blocks
    assert chunks[0].gather.halves.numel() == 2 * 4  # rows 453..499 lie in four


@settings(deadline=None)
@given(
    block_size=st.sampled_from([1, 3, 16]),
    num_slots=st.integers(0, 30),
    skipped=st.sets(st.integers(0, 29)),
    seed=st.integers(0, 2**32),
)
def test_write_equals_reference(block_size: int, num_slots: int, skipped: set[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_blocks = 30 // block_size + 1
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:num_slots]
    slots[[index for index in range(num_slots) if index in skipped]] = -1
    key = torch.randn(num_slots, 2, 4, generator=generator)
    value = torch.randn(num_slots, 2, 4, generator=generator)
    got = torch.zeros(num_blocks, 2, block_size, 2, 4)
    want = got.clone()
    fast.write_kv(got, key, value, slots)
    reference.write_kv(want, key, value, slots)
    assert torch.equal(got, want)


def test_write_takes_strided_heads() -> None:
    """Models hand over [heads, T, dim] views."""
    key, value = torch.randn(2, 2, 5, 4).transpose(1, 2)
    got, want = torch.zeros(2, 2, 2, 4, 2, 4)
    slots = torch.tensor([7, -1, 0, 1, 6])
    KvWrite(slots, 4).apply(got, key, value)
    reference.write_kv(want, key, value, slots)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("span", "message"),
    [
        (Span(0, 4, [0]), "query_len 0"),
        (Span(5, 4, [0]), "query_len 5"),
        (Span(1, 5, [0]), "1 blocks, 5 tokens need 2"),
        (Span(1, 5, [0, 3]), r"outside \[0, 3\)"),
        (Span(1, 5, [-1, 0]), r"outside \[0, 3\)"),
    ],
)
def test_a_span_that_does_not_fit_is_refused(span: Span, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionPlan([span], torch.zeros(3, 2, 4, 1, 4))


def test_shapes_that_do_not_fit_are_refused() -> None:
    kv = torch.zeros(3, 2, 4, 2, 4)
    plan = AttentionPlan([Span(1, 5, [0, 1])], kv)
    for shape in ((2, 2, 4), (1, 3, 4), (1, 2, 8)):
        with pytest.raises(ValueError, match="fits neither"):
            fast.paged_attention(torch.zeros(shape), kv, plan, scale=1.0)
    with pytest.raises(ValueError, match="sliding_window 0"):
        fast.paged_attention(torch.zeros(1, 2, 4), kv, plan, scale=1.0, sliding_window=0)
