"""Batches in, tokens out, by the native step over the heap's own memory. Needs no torch.

Owns the views on the heap's data region; rows and sampling are ``model/``'s. Must not know which sequences
run when, nor transfers.

    data region  [layer][block][K | V][row][kv_head][head_dim]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from microserve.kernels.cpu.step import MAX_THREADS, NUMPY_ELEMS, CpuStep
from microserve.protocol.errors import ConfigError
from microserve.services.engine.core.batch import Batch, StepResult
from microserve.services.engine.model.rows import result_of, rows_of
from microserve.services.engine.model.sampler import sample_rows
from microserve.services.engine.model.scorer import score_rows
from microserve.services.engine.native.kernels import Kernels
from microserve.services.engine.native.packed_model import PackedModel


class NativeRunner:
    """A ``Runner``. For one thread; holds no state of a step once it has ended."""

    stream: int | None = None
    """KV stands in memory when a step tells of it."""

    def __init__(
        self,
        model: PackedModel,
        kernels: Kernels,
        kv_data: npt.NDArray[np.uint8],
        num_blocks: int,
        block_size: int,
        *,
        threads: int,
        max_rows: int,
    ) -> None:
        """kv_data: the heap's data region, used in place; threads: as many as there can be, at most these.

        Raises :class:`KernelUnavailable` where there is no memory or no thread for a step, and
        :class:`ConfigError` where the region is too small or misaligned."""
        self.spec = model.spec
        self._num_blocks, self._block_size = num_blocks, block_size
        self.kernels = kernels.variant
        """What computes."""
        self.step = step_over(
            model,
            kernels,
            layers_in(model, kv_data, num_blocks, block_size),
            threads=min(threads, MAX_THREADS),
            max_rows=max_rows,
        )
        self.numerics = model.numerics(kernels.library, self.step.recipe)

    def execute(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult:
        """Compute the chunks, sample and score where asked.

        ``on_layer(layer)`` comes once a layer, in order, when the batch's KV of that layer stands in the
        blocks and before any is read; what it raises ends the step and is passed on. For a batch that is not
        layerwise it comes some times a second and at the end, and threads do not wait for it. Raises
        :class:`InternalError` for a batch that does not fit the model or the pool.
        """
        chunks = batch.chunks
        if not chunks:
            return StepResult([])
        rows = rows_of(chunks, self.spec, self._num_blocks, self._block_size)
        spans = [(len(c.token_ids), c.start + len(c.token_ids), c.block_table) for c in chunks]
        given = (rows.tokens, rows.positions, rows.slots, spans, rows.wanted)
        logits = self.step.run(*given, on_layer, batch.is_layerwise)
        if on_layer is not None and not batch.is_layerwise:
            on_layer(self.spec.num_layers - 1)
        if not rows.has_scores:
            return result_of(chunks, sample_rows(logits, rows.specs))
        scored = score_rows(logits, rows.scored, rows.scores)
        return result_of(chunks, sample_rows(logits[rows.sampled], rows.specs), scored)


Layers = list[npt.NDArray[Any]]
"""Of ``NUMPY_ELEMS``."""


def layers_in(model: PackedModel, kv_data: npt.NDArray[np.uint8], num_blocks: int, block_size: int) -> Layers:
    """Views of a data region, [num_blocks, 2, block_size, num_kv_heads, head_dim] each."""
    spec, elem = model.spec, NUMPY_ELEMS[model.shape.elem]
    shape = (spec.num_layers, num_blocks, 2, block_size, spec.num_kv_heads, spec.head_dim)
    nbytes = int(np.prod(shape)) * elem.itemsize
    data = kv_data.reshape(-1)
    if data.nbytes < nbytes or data.ctypes.data % elem.itemsize:
        raise ConfigError(
            f"the KV region holds {data.nbytes} bytes, needs {nbytes} aligned ones",
            field="kvcache.num_blocks",
        )
    return list(data[:nbytes].view(elem).reshape(shape))


def step_over(
    model: PackedModel, kernels: Kernels, layers: Layers, *, threads: int, max_rows: int
) -> CpuStep:
    """Raises :class:`KernelUnavailable`."""
    num_blocks, _, block_size, _, _ = layers[0].shape
    shape = replace(
        model.shape,
        block_size=block_size,
        num_blocks=num_blocks,
        max_rows=max_rows,
        max_context=min(model.spec.max_model_len, num_blocks * block_size),
        max_logits=max_rows,
    )
    return CpuStep(kernels.library, kernels.variant, shape, threads, model.weights, layers)
