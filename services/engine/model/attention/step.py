"""One step's attention, for model.py's attention function: where it writes new KV and what it attends to.

Built once a step and used by every layer. ``HostAttention`` gathers in plain torch, tuned for a CPU;
``DeviceAttention`` hands lengths and block tables to the kernels of a GPU, and never waits for it. Owns the
choice between them and what they upload; must not know sequences or who owns the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microserve.kernels.attention import gpu_attention
from microserve.kernels.attention.gpu_attention import DeviceBatch
from microserve.kernels.attention.paged_attention import (
    AttentionPlan,
    KvWrite,
    Span,
    Workspace,
    paged_attention,
)
from microserve.kernels.scatter.kv_scatter import kv_scatter


class StepAttention(Protocol):
    def write(self, kv: Tensor, key: Tensor, value: Tensor) -> None:
        """key, value: [num_tokens, num_kv_heads, head_dim], any strides; kv: one layer of the pool."""

    def attend(self, query: Tensor, kv: Tensor, *, scale: float, sliding_window: int | None) -> Tensor:
        """query: [num_tokens, num_heads, head_dim], any strides; after ``write``. Returns the same shape."""


class MakeAttention(Protocol):
    def __call__(self, spans: Sequence[Span], slots: npt.NDArray[np.int64], kv: Tensor) -> StepAttention:
        """spans: in the order of their tokens; slots: [num_tokens], ``block * block_size + row`` or -1 for a
        token that is not written; kv: any layer of the pool, for its geometry and device."""


class HostAttention:
    def __init__(
        self, spans: Sequence[Span], slots: npt.NDArray[np.int64], kv: Tensor, *, workspace: Workspace
    ) -> None:
        self._plan = AttentionPlan(spans, kv)
        self._write = KvWrite(torch.from_numpy(slots).to(kv.device), kv.shape[2])
        self._workspace = workspace

    def write(self, kv: Tensor, key: Tensor, value: Tensor) -> None:
        self._write.apply(kv, key, value)

    def attend(self, query: Tensor, kv: Tensor, *, scale: float, sliding_window: int | None) -> Tensor:
        return paged_attention(
            query, kv, self._plan, scale=scale, sliding_window=sliding_window, workspace=self._workspace
        )


class DeviceAttention:
    """Lengths, tables and slots are read on the device alone: a captured CUDA graph may hold its calls.

    slots: [num_tokens] int64, ``block * block_size + row``, or -1 for a token that is not written; on the
    batch's device. On a CPU it gives the same numbers, slowly: for tests.
    """

    def __init__(self, batch: DeviceBatch, slots: Tensor) -> None:
        self._batch, self._slots = batch, slots

    def write(self, kv: Tensor, key: Tensor, value: Tensor) -> None:
        kv_scatter(key, value, self._slots, kv)

    def attend(self, query: Tensor, kv: Tensor, *, scale: float, sliding_window: int | None) -> Tensor:
        # RoPE leaves the heads of a token far from each other; the kernels want them side by side.
        return gpu_attention.paged_attention(
            query.contiguous(), kv, self._batch, scale=scale, sliding_window=sliding_window
        )


class ExactAttention(DeviceAttention):
    """With bits that depend on a token and its context alone; on a CPU in Triton's interpreter only."""

    def attend(self, query: Tensor, kv: Tensor, *, scale: float, sliding_window: int | None) -> Tensor:
        from microserve.kernels.exact.triton_segments import paged_attention as attend_in_segments

        return attend_in_segments(query, kv, self._batch, scale=scale, sliding_window=sliding_window)


def device_attention(spans: Sequence[Span], slots: npt.NDArray[np.int64], kv: Tensor) -> DeviceAttention:
    """A step's ``DeviceAttention``; a ``MakeAttention``."""
    return DeviceAttention(device_batch(spans, kv.shape[2], kv.device), upload(slots, kv.device))


def exact_attention(spans: Sequence[Span], slots: npt.NDArray[np.int64], kv: Tensor) -> ExactAttention:
    """A step's ``ExactAttention``; a ``MakeAttention``."""
    return ExactAttention(device_batch(spans, kv.shape[2], kv.device), upload(slots, kv.device))


def device_batch(spans: Sequence[Span], block_size: int, device: torch.device) -> DeviceBatch:
    """Single tokens before the first longer span are worked on as decodes: the scheduler puts decodes first.

    Raises ``ValueError`` for a block table that does not hold its span.
    """
    lengths = [span.query_len for span in spans]
    contexts = np.array([span.context_len for span in spans], dtype=np.int32)
    needed = -(-contexts // block_size)
    tables = np.zeros((len(spans), int(needed.max(initial=1))), dtype=np.int32)
    for table, num_blocks, span in zip(tables, needed.tolist(), spans, strict=True):
        if len(span.block_table) < num_blocks:
            raise ValueError(f"{len(span.block_table)} blocks do not hold {span.context_len} tokens")
        table[:num_blocks] = span.block_table[:num_blocks]
    return DeviceBatch(
        query_starts=upload(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), device),
        context_lens=upload(contexts, device),
        block_tables=upload(tables, device),
        num_decodes=len(list(takewhile(lambda length: length == 1, lengths))),
    )


def upload(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """To the device, in order of its current stream, without waiting for it."""
    # torch keeps pinned memory from being used again until the copy is done.
    return on_host(values, device).to(device, non_blocking=device.type == "cuda")


def on_host(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """In memory from which a copy to the device does not wait."""
    host = torch.from_numpy(values)
    return host.pin_memory() if device.type == "cuda" else host
