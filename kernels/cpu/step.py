"""Steps of a model over a paged pool, by the native kernels.

Owns the memory of a step; weights and pool are borrowed. Must not know transformers, sequences or sampling.

    pool, a layer   [num_blocks, 2, block_size, num_kv_heads, head_dim], of bfloat16 the bits
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from microserve.kernels.cpu.library import ELEMS, VARIANTS, Batch, Library, OnLayer
from microserve.kernels.cpu.weights import PackedWeights, Shape, check_shape, config_of, place, told
from microserve.kernels.kernel_cache import KernelUnavailable

NUMPY_ELEMS: Mapping[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(np.uint16),
    "float32": np.dtype(np.float32),
}
MAX_THREADS = 64


class CpuStep:
    """For one thread of the caller's; ``threads`` work in a step, the caller's among them."""

    def __init__(
        self,
        library: Library,
        variant: str,
        shape: Shape,
        threads: int,
        weights: PackedWeights,
        pool: Sequence[npt.NDArray[Any]],
        recipe: str | None = None,
    ) -> None:
        """``weights`` as packed for such a model; ``pool``: its layers, written in place; ``recipe``: None
        for the one that the variant serves by.

        Raises :class:`KernelUnavailable` where there is no memory or no thread for it, ``ValueError`` for a
        shape that is none or of which the variant does not compute the elem so, and for weights or a pool
        that are not of it."""
        check_shape(shape)
        self._engine = None
        self.shape, self.variant = shape, variant
        elem = library.elem(variant, shape.elem, recipe)
        self.recipe = ELEMS[elem][0]
        self._calls = library.calls
        self._borrowed = (weights, list(pool))
        if len(pool) != shape.num_layers or len(weights.layers) != shape.num_layers:
            raise ValueError(f"{len(weights.layers)} layers with weights, and {len(pool)} of the pool")
        for kv in pool:
            self._check_pool(kv)
        engine = self._calls.ms_create(ctypes.byref(config_of(shape, VARIANTS.index(variant), elem, threads)))
        if not engine:
            raise KernelUnavailable(f"no memory, or fewer than {threads} threads, for the native step")
        self._engine = engine
        self._width = int(self._calls.ms_logits_width(engine))
        memory = weights.memory
        addresses = [kv.ctypes.data for kv in pool]
        nbytes = place(library, engine, weights, addresses, memory.ctypes.data)
        if nbytes != memory.nbytes or not memory.flags.c_contiguous:
            raise ValueError(f"packed weights of {memory.nbytes} bytes, and {nbytes} there have to be")

    def run(
        self,
        tokens: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        slots: npt.NDArray[np.int64],
        spans: Sequence[tuple[int, int, Sequence[int]]],
        logit_rows: npt.NDArray[np.int64],
        on_layer: Callable[[int], None] | None = None,
        is_layerwise: bool = True,
    ) -> npt.NDArray[np.float32]:
        """Logits [len(logit_rows), vocab].

        tokens, positions, slots: [rows], slots -1 where KV is not written; spans: rows, context and blocks of
        each, in the order of the rows. ``on_layer`` comes when a layer's KV stands in the pool, and what it
        raises ends the step; not ``is_layerwise``: it comes some times a second, as a sign of life, and what
        it raises is raised at the step's end. Raises ``ValueError`` for a batch that does not fit.
        """
        self._check_open()
        if not len(tokens) == len(positions) == len(slots):
            raise ValueError(f"{len(tokens)} tokens, {len(positions)} positions, {len(slots)} slots")
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.shape.vocab:
            raise ValueError(f"a token is not below {self.shape.vocab}")
        contexts = np.array([context for _, context, _ in spans], np.int32)
        needed = -(-contexts // self.shape.block_size)
        tables = np.zeros((len(spans), int(needed.max(initial=1))), np.int32)
        for row, count, (_, context, table) in zip(tables, needed.tolist(), spans, strict=True):
            if len(table) < count:
                raise ValueError(f"{len(table)} blocks do not hold {context} tokens")
            row[:count] = table[:count]
        logits = np.empty((len(logit_rows), self._width), np.float32)
        arrays: dict[str, npt.NDArray[Any]] = {
            "tokens": tokens.astype(np.int32),
            "positions": positions.astype(np.int32),
            "slots": np.ascontiguousarray(slots, np.int64),
            "span_rows": np.array([rows for rows, _, _ in spans], np.int32),
            "span_contexts": contexts,
            "tables": tables,
            "logit_rows": logit_rows.astype(np.int32),
        }
        batch = Batch(
            num_rows=len(tokens),
            num_spans=len(spans),
            num_logits=len(logit_rows),
            table_width=tables.shape[1],
            is_layerwise=int(is_layerwise),
            logits=logits.ctypes.data,
            **{name: array.ctypes.data for name, array in arrays.items()},
        )
        raised: list[BaseException] = []

        def tell(layer: int) -> int:
            assert on_layer is not None
            try:
                on_layer(layer)
            except BaseException as error:  # ctypes would only print it
                raised.append(error)
                return 1
            return 0

        callback = OnLayer(tell) if on_layer is not None else OnLayer(0)
        told(self._calls.ms_step(self._engine, ctypes.byref(batch), callback))
        if raised:
            raise raised[0]
        return logits[:, : self.shape.vocab]

    def close(self) -> None:
        """Give memory and threads back; nothing may be called afterwards."""
        engine, self._engine = self._engine, None
        self._calls.ms_destroy(engine)

    def __del__(self) -> None:
        if getattr(self, "_engine", None):
            self.close()

    def _check_open(self) -> None:
        if self._engine is None:
            raise ValueError("the native step is closed")

    def _check_pool(self, kv: npt.NDArray[Any]) -> None:
        s = self.shape
        wanted, elem = (s.num_blocks, 2, s.block_size, s.num_kv_heads, s.head_dim), NUMPY_ELEMS[s.elem]
        if kv.shape != wanted or kv.dtype != elem or not kv.flags.c_contiguous:
            raise ValueError(f"kv is {kv.shape} of {kv.dtype}, and has to be {wanted} of {elem} in one piece")
