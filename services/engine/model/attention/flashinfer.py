"""FlashInfer's prefill kernels for steps that hold a chunk of a prompt, where it is installed.

A step is planned on the host once for each kind of layer (its scale and its window), at the first layer of
that kind, and run by every one. Its pages are our blocks and its "NHD" layout is ours. Owns what FlashInfer
is told; must not know who asked for it (``attention_choice.py``), sequences, or who owns the blocks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microserve.kernels import cuda_module
from microserve.kernels.attention.paged_attention import Span
from microserve.kernels.scatter.kv_scatter import kv_scatter
from microserve.services.engine.model.attention.step import StepAttention, device_attention, on_host, upload

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128, 256)
"""The sizes and dtypes that its kernels are made for, of all that the engine serves."""

_LEAST_WORKSPACE_NBYTES = 128 << 20
"""What FlashInfer recommends."""
_THREAD_BLOCKS_PER_MULTIPROCESSOR = 2
_TILE_ROWS = 128
"""As its planner counts when it splits contexts over thread blocks; only the workspace depends on both."""


class PrefillWrapper(Protocol):
    """``flashinfer.BatchPrefillWithPagedKVCacheWrapper``, as far as it is used."""

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
    ) -> None: ...

    def run(self, q: Tensor, paged_kv_cache: Tensor, *, out: Tensor) -> Tensor: ...


class Pages(NamedTuple):
    """A step as FlashInfer is told of it, all int32."""

    query_starts: npt.NDArray[np.int32]
    """[num_sequences + 1], into the packed query."""
    page_starts: npt.NDArray[np.int32]
    """[num_sequences + 1], into ``pages``."""
    pages: npt.NDArray[np.int32]
    """Every sequence's blocks of tokens [0, context_len), one sequence after the other."""
    last_page_lens: npt.NDArray[np.int32]
    """[num_sequences]: rows of a sequence's last block that are its own, at least 1."""


class FlashInfer:
    """A ``MakeAttention`` for one engine: steps of single tokens alone go to ``device_attention``.

    make_wrapper: called once for each kind of layer; the wrapper is planned anew in every step that holds a
    chunk, so a step must have left the device before the next one is computed: a plan is copied to the device
    from memory that the next plan overwrites. For one thread.
    """

    def __init__(self, make_wrapper: Callable[[], PrefillWrapper]) -> None:
        self._make_wrapper = make_wrapper
        self._wrappers: dict[tuple[float, int | None], PrefillWrapper] = {}

    def __call__(self, spans: Sequence[Span], slots: npt.NDArray[np.int64], kv: Tensor) -> StepAttention:
        """Raises ``ValueError`` for a block table that does not hold its span."""
        if all(span.query_len == 1 for span in spans):
            return device_attention(spans, slots, kv)
        return FlashInferAttention(step_pages(spans, kv.shape[2]), upload(slots, kv.device), self.wrapper)

    def wrapper(self, scale: float, sliding_window: int | None) -> PrefillWrapper:
        kind = (scale, sliding_window)
        if kind not in self._wrappers:
            self._wrappers[kind] = self._make_wrapper()
        return self._wrappers[kind]


class FlashInferAttention:
    """One step. slots: [num_tokens] int64, as in ``DeviceAttention``."""

    def __init__(
        self, pages: Pages, slots: Tensor, wrapper_of: Callable[[float, int | None], PrefillWrapper]
    ) -> None:
        self._slots, self._wrapper_of = slots, wrapper_of
        self._pages = [on_host(array, slots.device) for array in pages]
        self._planned: dict[tuple[float, int | None], PrefillWrapper] = {}

    def write(self, kv: Tensor, key: Tensor, value: Tensor) -> None:
        kv_scatter(key, value, self._slots, kv)

    def attend(self, query: Tensor, kv: Tensor, *, scale: float, sliding_window: int | None) -> Tensor:
        kind = (scale, sliding_window)
        if kind not in self._planned:
            wrapper = self._wrapper_of(scale, sliding_window)
            self._plan(wrapper, query, kv, scale, sliding_window)
            self._planned[kind] = wrapper
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        return self._planned[kind].run(query.contiguous(), kv, out=out)

    def _plan(
        self, wrapper: PrefillWrapper, query: Tensor, kv: Tensor, scale: float, sliding_window: int | None
    ) -> None:
        if sliding_window is not None and sliding_window < 1:
            raise ValueError(f"sliding_window {sliding_window} must be at least 1")
        _, _, block_size, num_kv_heads, head_dim = kv.shape
        wrapper.plan(
            *(self._pages[0], self._pages[1], self._pages[2], self._pages[3]),
            *(query.shape[1], num_kv_heads, head_dim, block_size),
            causal=True,  # the last new token sees the whole context, those before it less and less
            sm_scale=scale,
            # How many tokens before its own a token sees. Never dropped for a context that is shorter:
            # layers without a window run another kernel, which may have to be compiled first.
            window_left=-1 if sliding_window is None else sliding_window - 1,
            q_data_type=query.dtype,
            kv_data_type=kv.dtype,
        )


def step_pages(spans: Sequence[Span], block_size: int) -> Pages:
    """Raises ``ValueError`` for a block table that does not hold its span."""
    contexts = np.array([span.context_len for span in spans], dtype=np.int64)
    needed = -(-contexts // block_size)
    for num_blocks, span in zip(needed.tolist(), spans, strict=True):
        if not 1 <= span.query_len <= span.context_len or len(span.block_table) < num_blocks:
            raise ValueError(
                f"{len(span.block_table)} blocks do not hold {span.context_len} tokens, {span.query_len} new"
            )
    tables = [np.asarray(s.block_table[:n], np.int32) for s, n in zip(spans, needed.tolist(), strict=True)]
    return Pages(
        query_starts=_starts([span.query_len for span in spans]),
        page_starts=_starts(needed.tolist()),
        pages=np.concatenate(tables),
        last_page_lens=((contexts - 1) % block_size + 1).astype(np.int32),
    )


def _starts(lengths: list[int]) -> npt.NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def load_flashinfer(
    device: torch.device, num_heads: int, num_kv_heads: int, head_dim: int, backend: str
) -> Callable[[], PrefillWrapper]:
    """Makes FlashInfer's wrappers, which share one workspace, as layers run one after the other.

    backend: its name for a set of kernels, ``fa2`` or, on sm_90 alone, ``fa3``. Raises what its import
    raises.
    """
    flashinfer: Any = importlib.import_module("flashinfer")
    multiprocessors = cuda_module.num_multiprocessors(device)
    nbytes = workspace_nbytes(num_heads, num_kv_heads, head_dim, multiprocessors)
    workspace = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def make_wrapper() -> PrefillWrapper:
        wrapper: PrefillWrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            workspace, "NHD", backend=backend
        )
        return wrapper

    return make_wrapper


def workspace_nbytes(num_heads: int, num_kv_heads: int, head_dim: int, num_multiprocessors: int) -> int:
    """Its planner's most: of each tile's every row an output in fp32 and a weight."""
    tiles = _THREAD_BLOCKS_PER_MULTIPROCESSOR * num_multiprocessors // num_kv_heads
    return max(_LEAST_WORKSPACE_NBYTES, num_heads * tiles * _TILE_ROWS * (head_dim + 1) * 4 + 4096)
