"""What FlashInfer is told of a step, on CPU tensors with a stand-in for its kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from microserve.kernels import reference
from microserve.kernels.attention.paged_attention import Span
from microserve.services.engine.model.attention.flashinfer import FlashInfer, step_pages, workspace_nbytes
from microserve.services.engine.model.attention.step import DeviceAttention
from tests.support.engine.device.flashinfer_stand_in import StandInWrapper

BLOCK, NUM_KV_HEADS, NUM_HEADS, HEAD_DIM = 4, 2, 6, 16
SPANS = [Span(1, 5, [7, 2]), Span(1, 4, [0, 9, 9]), Span(6, 6, [3, 1]), Span(3, 9, [5, 8, 4])]
LAYERS = [(0.25, None), (0.25, 3), (0.25, 1), (0.5, 3)]
"""(scale, sliding window) of four kinds of layers."""


class Made:
    """A ``FlashInfer`` and the wrappers that it has asked for."""

    def __init__(self) -> None:
        self.wrappers: list[StandInWrapper] = []
        self.make = FlashInfer(self._make_wrapper)

    def _make_wrapper(self) -> StandInWrapper:
        self.wrappers.append(StandInWrapper())
        return self.wrappers[-1]


def slots_of(spans: list[Span]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    slots = [
        span.block_table[place // BLOCK] * BLOCK + place % BLOCK
        for span in spans
        for place in range(span.context_len - span.query_len, span.context_len)
    ]
    return np.array(slots, dtype=np.int64)


def pool(spans: list[Span]) -> torch.Tensor:
    """NaN but for the contexts' rows."""
    kv = torch.full((10, 2, BLOCK, NUM_KV_HEADS, HEAD_DIM), float("nan"))
    for span in spans:
        for place in range(span.context_len):
            kv[span.block_table[place // BLOCK], :, place % BLOCK] = torch.randn(2, NUM_KV_HEADS, HEAD_DIM)
    return kv


def test_the_pages_of_a_step() -> None:
    pages = step_pages(SPANS, BLOCK)
    assert [array.dtype for array in pages] == [np.int32] * 4
    assert pages.query_starts.tolist() == [0, 1, 2, 8, 11]
    assert pages.page_starts.tolist() == [0, 2, 3, 5, 8]
    assert pages.pages.tolist() == [7, 2, 0, 3, 1, 5, 8, 4]  # blocks past a context are left out
    assert pages.last_page_lens.tolist() == [1, 4, 2, 1]


@pytest.mark.parametrize("span", [Span(1, 9, [1, 2]), Span(0, 4, [1]), Span(5, 4, [1, 2])])
def test_a_span_that_does_not_fit_is_refused(span: Span) -> None:
    with pytest.raises(ValueError, match="blocks do not hold"):
        step_pages([SPANS[0], span], BLOCK)


def test_mixed_steps_of_layers_of_every_kind_equal_the_oracle_and_are_planned_once() -> None:
    torch.manual_seed(3)
    made = Made()
    for step, spans in enumerate([SPANS, [SPANS[2]], SPANS[1:]]):
        num_tokens = sum(span.query_len for span in spans)
        kv = pool(spans)
        attention = made.make(spans, slots_of(spans), kv)
        for scale, window in LAYERS * 2:
            key, value, query = (
                torch.randn(num_heads, num_tokens, HEAD_DIM).transpose(0, 1)
                for num_heads in (NUM_KV_HEADS, NUM_KV_HEADS, NUM_HEADS)
            )
            want_kv = kv.clone()
            reference.write_kv(want_kv, key, value, torch.from_numpy(slots_of(spans)))
            attention.write(kv, key, value)
            torch.testing.assert_close(kv, want_kv, rtol=0, atol=0, equal_nan=True)
            out = attention.attend(query, kv, scale=scale, sliding_window=window)
            want = reference.paged_attention(query, kv, spans, scale=scale, sliding_window=window)
            torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
        # One wrapper for each kind of layer, the same in every step, planned at its first layer alone.
        assert [wrapper.plans[step:] for wrapper in made.wrappers] == [
            [(0.25, -1)],
            [(0.25, 2)],
            [(0.25, 0)],
            [(0.5, 2)],
        ]
    assert [wrapper.runs for wrapper in made.wrappers] == [6] * 4


def test_steps_of_single_tokens_stay_with_the_kernels_that_graphs_can_hold() -> None:
    made = Made()
    spans = SPANS[:2]
    assert isinstance(made.make(spans, slots_of(spans), pool(spans)), DeviceAttention)
    assert not made.wrappers


def test_a_window_of_nothing_is_refused() -> None:
    kv = pool(SPANS)
    attention = Made().make(SPANS, slots_of(SPANS), kv)
    with pytest.raises(ValueError, match="sliding_window 0 must be at least 1"):
        attention.attend(torch.zeros(11, NUM_HEADS, HEAD_DIM), kv, scale=1.0, sliding_window=0)


def test_the_workspace_holds_what_the_planner_may_ask_for() -> None:
    # Split contexts: 33 tiles of 128 rows of each head, 256 values and a weight in fp32.
    assert workspace_nbytes(64, 8, 256, 132) >= 64 * 33 * 128 * (256 + 1) * 4 > 128 << 20
    assert workspace_nbytes(9, 3, 64, 132) == 128 << 20
