"""Decode steps as CUDA graphs: one captured forward pass a bucket of batch sizes, replayed over new inputs.

A decode step of a small batch is a thousand short launches, and to enqueue them takes the host longer than
the device needs to run them. A replay enqueues all of them at once.

    host      token, position, slot, context length of each sequence      block tables
                     └──── one upload ────> inputs [4, largest]      └──> tables [largest, max_blocks]
    replay    the captured launches read the first places of both ──────> logits [bucket, vocab_size]

A batch runs in the smallest bucket that holds it. A place without a sequence has a context of 0 and the slot
-1: its attention is zero and its KV is not written. All buckets read the same inputs, and each run writes all
places of its bucket, so nothing is left over from the run before.

What a capture bakes in: every address, every shape, every number that the host knew. So nothing in it may
depend on a length or a table but by reading it on the device, and whatever is read is kept alive here;
tests/support/engine/device/recorded_graph.py holds that against a stand-in that bakes in just as much.

Owns inputs, buckets and captured passes. Must not know sequences, sampling, nor transfers: a step in which a
layer is sent or awaited is never replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microserve.kernels.attention.gpu_attention import DeviceBatch
from microserve.kernels.attention.paged_attention import Span
from microserve.services.engine.model.attention.step import DeviceAttention, upload

MAX_BUCKET = 256
"""Larger batches are run launch by launch: the device is busy for longer than the host."""

Pass = Callable[[DeviceAttention, Tensor, Tensor], Tensor]
"""(attention, token ids [n], positions [n]) -> logits [n, vocab_size]."""


class Capture(Protocol):
    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """A replay of what ``run`` enqueues, and the output that each replay fills."""


class CudaCapture:
    """Captures in ``stream``, in which the replays are to run; the graphs share their memory."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pool: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        # Once for real: that kernels are compiled and libraries take their workspace cannot be captured.
        run()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = run()
        self._pool = graph.pool()
        return graph.replay, output


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Ascending; the largest is ``max_num_seqs`` or ``MAX_BUCKET``. A bucket wastes under half of its places
    below 8, and under 8, 16 or 32 above."""
    largest = min(max_num_seqs, MAX_BUCKET)
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, MAX_BUCKET, 32)]
    return [*(size for size in sizes if size < largest), largest]


class DecodeGraphs:
    """``run`` gives what the forward pass gives, for steps of one token a sequence.

    Captures at once, the largest bucket first: the others find their memory in its own, but for their logits.
    For one thread, in inference mode, on the stream of ``capture``.
    """

    def __init__(
        self,
        forward: Pass,
        capture: Capture,
        *,
        max_num_seqs: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
        attention: type[DeviceAttention] = DeviceAttention,
    ) -> None:
        """``max_blocks``: of one sequence; ``attention``: of every pass."""
        self._block_size = block_size
        sizes = bucket_sizes(max_num_seqs)
        largest = sizes[-1]
        self._max_blocks = max_blocks
        self._inputs = torch.zeros(4, largest, dtype=torch.int64, device=device)
        self._inputs[2] = -1
        self._tables = torch.zeros(largest, max_blocks, dtype=torch.int32, device=device)
        self._starts = torch.arange(largest + 1, dtype=torch.int32, device=device)
        self._graphs: dict[int, tuple[Callable[[], object], Tensor]] = {}
        for size in reversed(sizes):

            def run(size: int = size) -> Tensor:
                tokens, positions, slots, contexts = self._inputs[:, :size]
                batch = DeviceBatch(
                    self._starts[: size + 1], contexts.int(), self._tables[:size], num_decodes=size
                )
                return forward(attention(batch, slots), tokens, positions)

            self._graphs[size] = capture(run)
        self._sizes = sizes

    def fits(self, spans: Sequence[Span]) -> bool:
        longest = self._max_blocks * self._block_size
        return len(spans) <= self._sizes[-1] and all(
            span.query_len == 1 and span.context_len <= longest for span in spans
        )

    def run(
        self,
        tokens: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        slots: npt.NDArray[np.int64],
        spans: Sequence[Span],
    ) -> Tensor:
        """Logits [len(spans), vocab_size], good until the next run. The arrays are [len(spans)]; slots as for
        :class:`DeviceAttention`. ``spans`` must fit."""
        count = len(spans)
        size = next(size for size in self._sizes if size >= count)
        inputs = np.zeros((4, size), dtype=np.int64)
        inputs[2] = -1
        contexts = [span.context_len for span in spans]
        inputs[:, :count] = tokens, positions, slots, contexts
        width = -(-max(contexts) // self._block_size)
        tables = np.zeros((count, width), dtype=np.int32)
        for row, span in zip(tables, spans, strict=True):
            held = span.block_table[: -(-span.context_len // self._block_size)]
            row[: len(held)] = held
        device = self._inputs.device
        self._inputs[:, :size].copy_(upload(inputs, device))
        self._tables[:count, :width].copy_(upload(tables, device))
        replay, logits = self._graphs[size]
        replay()
        return logits[:count]
