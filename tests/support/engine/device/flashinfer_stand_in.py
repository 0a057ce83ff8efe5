"""FlashInfer's paged prefill wrapper on CPU tensors, by what its documentation says of the arguments.

``test_flashinfer_package.py`` holds the calls against the package itself, where it is installed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from microserve.kernels.attention.paged_attention import AttentionPlan, Span, paged_attention


def attend(
    query: Tensor,
    kv: Tensor,
    arrays: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    scale: float,
    window_left: int,
) -> Tensor:
    """Causal attention, aligned at the end of each context.

    arrays: qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len; kv: combined "NHD" pages.
    """
    for array in arrays:
        assert array.dtype == torch.int32
        assert array.is_contiguous()
    starts, page_starts, pages, last_lens = (array.tolist() for array in arrays)
    assert len(starts) == len(page_starts) == len(last_lens) + 1
    assert starts[-1] == len(query)
    assert page_starts[-1] == len(pages)
    spans = []
    for place, last_len in enumerate(last_lens):
        table = pages[page_starts[place] : page_starts[place + 1]]
        context = (len(table) - 1) * kv.shape[2] + last_len
        spans.append(Span(starts[place + 1] - starts[place], context, table))
    window = None if window_left < 0 else window_left + 1
    return paged_attention(query, kv, AttentionPlan(spans, kv), scale=scale, sliding_window=window)


@dataclass
class StandInWrapper:
    plans: list[tuple[float, int]] = field(default_factory=list)
    """(sm_scale, window_left) of every plan so far."""
    runs: int = 0

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        sm_scale: float,
        window_left: int,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert causal
        self._arrays = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._query_shape = (num_qo_heads, head_dim_qk)
        self._kv_shape = (2, page_size, num_kv_heads, head_dim_qk)
        self._dtypes = (q_data_type, kv_data_type)
        self._scale, self._window_left = sm_scale, window_left
        self.plans.append((sm_scale, window_left))

    def run(self, q: Tensor, paged_kv_cache: Tensor, *, out: Tensor) -> Tensor:
        assert (q.shape[1:], paged_kv_cache.shape[1:]) == (self._query_shape, self._kv_shape)
        assert (q.dtype, paged_kv_cache.dtype, out.dtype) == (*self._dtypes, q.dtype)
        assert q.is_contiguous()
        self.runs += 1
        mixed = attend(q, paged_kv_cache, self._arrays, scale=self._scale, window_left=self._window_left)
        return out.copy_(mixed)
