"""A model's weights as the native step reads them: packed into one piece of memory, wherever that is.

Owns what there is of a model and in which order it is told, not how it lies there
(``native/door/weights.cc``), nor where it comes from (``packing.py``). Must not know tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from microserve.kernels.cpu.library import VARIANTS, WEIGHTS, Config, Layer, Library, Model
from microserve.kernels.kernel_cache import KernelUnavailable

DTYPES = ("bfloat16", "float32")
MAX_GROUP = 32
"""Query heads of a KV head."""
_NO_COUNTS = ("elem", "eps", "scale", "weights")


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
    block_size: int = 1
    num_blocks: int = 1
    max_rows: int = 1
    """Tokens of a step."""
    max_context: int = 1
    """Positions of a sequence."""
    max_logits: int = 1
    """Rows of a step whose logits are wanted."""
    weights: str = "dtype"
    """How matrices of layers and the head stand, one of ``WEIGHTS``: as elem says, or packed to int8."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What a layer is beside its weights."""

    vectors: tuple[str, ...]
    """Those that it has, by the names of ``Layer.FLOATS``."""
    use_rope: bool = True
    window: int | None = None


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """``memory`` is only read, and may be shared with other processes."""

    memory: npt.NDArray[np.uint8]
    """Begins with a page."""
    layers: tuple[LayerKind, ...]
    has_head: bool
    """Its own; else it is the embedding."""
    num_positions: int
    """For which there are tables of RoPE."""


def packed_nbytes(library: Library, shape: Shape, weights: PackedWeights) -> int:
    """How much memory such weights are to be; what ``weights.memory`` is does not matter."""
    engine = idle_engine(library, shape)
    try:
        return place(library, engine, weights, [0] * len(weights.layers), None)
    finally:
        library.calls.ms_destroy(engine)


def place(
    library: Library, engine: Any, weights: PackedWeights, pool: Sequence[int], memory: int | None
) -> int:
    """Tell an engine of ms_create where its weights and its pool are: their addresses; ``memory`` None: they
    are only counted. Returns how many bytes the weights are. Raises ``ValueError`` with what is wrong."""
    calls = library.calls
    calls.ms_place_weights(engine, memory, 1)
    there = 1  # not null: that is all that is looked at
    for index, (kind, kv) in enumerate(zip(weights.layers, pool, strict=True)):
        layer = Layer(kv=kv, use_rope=int(kind.use_rope), window=kind.window or 0)
        for name in (*Layer.WEIGHTS, *kind.vectors):
            setattr(layer, name, there)
        told(calls.ms_set_layer(engine, index, ctypes.byref(layer)))
    names = ("embedding", "norm", "cos", "sin", *(["head"] if weights.has_head else []))
    model = Model(**dict.fromkeys(names, there), num_positions=weights.num_positions)
    told(calls.ms_set_model(engine, ctypes.byref(model)))
    return int(calls.ms_weights_nbytes(engine))


def told(problem: bytes | None) -> None:
    """What the native step answered."""
    if problem == b"memory":
        raise KernelUnavailable("no memory for the native step")
    if problem is not None:
        raise ValueError(f"the native step refuses {problem.decode()}")


def config_of(shape: Shape, variant: int, elem: int, threads: int) -> Config:
    """variant, elem: numbers of ``VARIANTS`` and ``ELEMS``."""
    names = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden", "intermediate", "vocab")
    bounds = ("block_size", "num_blocks", "max_rows", "max_context", "max_logits", "eps", "scale")
    sizes = {name: getattr(shape, name) for name in (*names, *bounds)}
    weights = WEIGHTS.index(shape.weights)
    return Config(variant=variant, elem=elem, weights=weights, threads=threads, **sizes)


def idle_engine(library: Library, shape: Shape) -> Any:
    """One that computes nothing, to pack or to count by; to be given to ms_destroy. What is packed is
    the same for all variants and recipes of a dtype and kind of weights."""
    config = config_of(shape, VARIANTS.index("portable"), library.elem("portable", shape.elem), 1)
    engine = library.calls.ms_create(ctypes.byref(config))
    if not engine:
        raise KernelUnavailable("no memory to look at weights for the native step")
    return engine


def check_shape(shape: Shape) -> None:
    counts = {name: getattr(shape, name) for name in shape.__slots__ if name not in _NO_COUNTS}
    if shape.elem not in DTYPES or shape.weights not in WEIGHTS or min(counts.values()) < 1:
        raise ValueError(f"a model of {shape.elem}, weights of {shape.weights}, with {counts}")
    group, rest = divmod(shape.num_heads, shape.num_kv_heads)
    if rest or group > MAX_GROUP or shape.head_dim % 2:
        raise ValueError(
            f"{shape.num_heads} heads of {shape.head_dim} on {shape.num_kv_heads}: no whole number up to "
            f"{MAX_GROUP} for each, or an odd size"
        )
