"""A model packed for the native step, and steps of it over a paged pool.

Owns the memory of the packed weights and of a step. Must not know transformers, sequences or sampling.

    pool, a layer   [num_blocks, 2, block_size, num_kv_heads, head_dim]
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microserve.kernels.cpu.library import ELEMS, VARIANTS, Batch, Config, Layer, Library, OnLayer
from microserve.kernels.kernel_cache import KernelUnavailable

TORCH_ELEMS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MAX_GROUP = 32
"""Query heads of a KV head."""
MAX_THREADS = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model, and the bounds of a step."""

    elem: str
    """``bfloat16`` or ``float32``: of weights, activations and KV. Sums and the residual are float32."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    eps: float
    scale: float
    """Of the scores, before the softmax."""
    block_size: int
    num_blocks: int
    max_rows: int
    """Tokens of a step."""
    max_context: int
    """Positions of a sequence."""
    max_logits: int
    """Rows of a step whose logits are wanted."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Tensors on the CPU. Matrices [out, in] in the shape's elem; norms and biases of any float type."""

    matrices: Mapping[str, Tensor]
    """By the names of ``Layer.WEIGHTS``."""
    vectors: Mapping[str, Tensor]
    """By the names of ``Layer.FLOATS``; of biases and of q_norm and k_norm only those that there are."""
    use_rope: bool = True
    window: int | None = None


class CpuStep:
    """For one thread of the caller's; ``threads`` work in a step, the caller's among them."""

    def __init__(
        self, library: Library, variant: str, shape: Shape, threads: int, recipe: str | None = None
    ) -> None:
        """``recipe``: None for the one that the variant serves by. Raises :class:`KernelUnavailable` where
        there is no memory or no thread for it, ``ValueError`` for a shape that is none, or of which the
        variant does not compute the elem so."""
        _check_shape(shape)
        self.shape, self.variant = shape, variant
        elem = library.elem(variant, shape.elem, recipe)
        self.recipe = ELEMS[elem][0]
        self._calls = library.calls
        names = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden", "intermediate", "vocab")
        bounds = ("block_size", "num_blocks", "max_rows", "max_context", "max_logits", "eps", "scale")
        config = Config(
            variant=VARIANTS.index(variant),
            elem=elem,
            threads=threads,
            **{name: getattr(shape, name) for name in (*names, *bounds)},
        )
        self._engine = self._calls.ms_create(ctypes.byref(config))
        if not self._engine:
            raise KernelUnavailable(f"no memory, or fewer than {threads} threads, for the native step")
        self._width = int(self._calls.ms_logits_width(self._engine))
        self._pool: list[Tensor] = []

    def set_layer(self, index: int, weights: LayerWeights, kv: Tensor) -> None:
        """Pack a layer's weights, which are not needed afterwards; ``kv`` is its layer of the pool, used in
        place. Raises ``ValueError`` for what is missing or of another shape."""
        self._check_open()
        self._check_layer(weights, kv)
        layer, kept = Layer(), []
        for names, given, dtype in (
            (Layer.WEIGHTS, weights.matrices, TORCH_ELEMS[self.shape.elem]),
            (Layer.FLOATS, weights.vectors, torch.float32),
        ):
            for name in names:
                if (tensor := given.get(name)) is not None:
                    kept.append(_plain(tensor, dtype))
                    setattr(layer, name, kept[-1].data_ptr())
        layer.kv, layer.use_rope, layer.window = kv.data_ptr(), int(weights.use_rope), weights.window or 0
        self._pool.append(kv)
        self._told(self._calls.ms_set_layer(self._engine, index, ctypes.byref(layer)))

    def set_model(
        self, embedding: Tensor, head: Tensor | None, norm: Tensor, cos: Tensor, sin: Tensor
    ) -> None:
        """embedding, head: [vocab, hidden], head None for a tied one; norm: [hidden]; cos, sin:
        [max_context, head_dim / 2]. Raises ``ValueError`` for another shape."""
        self._check_open()
        shape = self.shape
        rows, table = (shape.vocab, shape.hidden), (shape.max_context, shape.head_dim // 2)
        _check("embedding", embedding, rows)
        _check("head", head, rows)
        _check("norm", norm, (shape.hidden,))
        _check("cos", cos, table)
        _check("sin", sin, table)
        elem = TORCH_ELEMS[self.shape.elem]
        given = [None if tensor is None else _plain(tensor, elem) for tensor in (embedding, head)]
        given += [_plain(tensor, torch.float32) for tensor in (norm, cos, sin)]
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in given]
        self._told(self._calls.ms_set_model(self._engine, *pointers))

    def run(
        self,
        tokens: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        slots: npt.NDArray[np.int64],
        spans: Sequence[tuple[int, int, Sequence[int]]],
        logit_rows: npt.NDArray[np.int64],
        on_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Logits [len(logit_rows), vocab], float32.

        tokens, positions, slots: [rows], slots -1 where KV is not written; spans: rows, context and blocks of
        each, in the order of the rows. ``on_layer`` comes when a layer's KV stands in the pool; what it
        raises ends the step. Raises ``ValueError`` for a batch that does not fit.
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
        logits = torch.empty((len(logit_rows), self._width), dtype=torch.float32)
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
            logits=logits.data_ptr(),
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

        told = OnLayer(tell) if on_layer is not None else OnLayer(0)
        self._told(self._calls.ms_step(self._engine, ctypes.byref(batch), told))
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

    def _check_layer(self, weights: LayerWeights, kv: Tensor) -> None:
        s = self.shape
        queries, keys = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        outs = {"q": queries, "k": keys, "v": keys, "o": s.hidden}
        shapes: dict[str, tuple[int, ...]] = {name: (outs[name], s.hidden) for name in "qkv"}
        shapes |= {"o": (s.hidden, queries), "down": (s.hidden, s.intermediate)}
        shapes |= {"gate": (s.intermediate, s.hidden), "up": (s.intermediate, s.hidden)}
        shapes |= {"attention_norm": (s.hidden,), "mlp_norm": (s.hidden,)}
        if missing := shapes.keys() - {*weights.matrices, *weights.vectors}:
            raise ValueError(f"a layer without {', '.join(sorted(missing))}")
        biases = {name for name in "qkv" if f"{name}_bias" in weights.vectors}
        if len(biases) not in (0, 3):
            raise ValueError(f"biases of {', '.join(sorted(biases))} alone")
        shapes |= {f"{name}_bias": (out,) for name, out in outs.items()}
        shapes |= {"q_norm": (s.head_dim,), "k_norm": (s.head_dim,)}
        for name, tensor in (*weights.matrices.items(), *weights.vectors.items()):
            if name not in shapes:
                raise ValueError(f"a layer with {name}, which is not computed")
            _check(name, tensor, shapes[name])
        if weights.window is not None and weights.window < 1:
            raise ValueError(f"a window of {weights.window}")
        _check("kv", kv, (s.num_blocks, 2, s.block_size, s.num_kv_heads, s.head_dim))
        if kv.dtype != TORCH_ELEMS[s.elem] or not kv.is_contiguous():
            raise ValueError(f"kv is {kv.dtype}, and has to be {s.elem} in one piece")

    def _told(self, problem: bytes | None) -> None:
        if problem == b"memory":
            raise KernelUnavailable("no memory for the native step")
        if problem is not None:
            raise ValueError(f"the native step refuses {problem.decode()}")


def _check_shape(shape: Shape) -> None:
    counts = {name: getattr(shape, name) for name in shape.__slots__ if name not in ("elem", "eps", "scale")}
    if shape.elem not in TORCH_ELEMS or min(counts.values()) < 1:
        raise ValueError(f"a model of {shape.elem} with {counts}")
    group, rest = divmod(shape.num_heads, shape.num_kv_heads)
    if rest or group > MAX_GROUP or shape.head_dim % 2:
        raise ValueError(
            f"{shape.num_heads} heads of {shape.head_dim} on {shape.num_kv_heads}: no whole number up to "
            f"{MAX_GROUP} for each, or an odd size"
        )


def _check(name: str, tensor: Tensor | None, wanted: tuple[int, ...]) -> None:
    if tensor is not None and (tuple(tensor.shape) != wanted or tensor.device.type != "cpu"):
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} on {tensor.device.type}, and has to be {wanted} on cpu"
        )


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype).contiguous()
