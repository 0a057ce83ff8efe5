"""From a checkpoint's tensors to packed weights.

Owns what fits a shape and what does not. The one file of the native step that needs torch, and only who packs
needs it. Must not know where packed weights are kept.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microserve.kernels.cpu.library import Layer, Library, Model
from microserve.kernels.cpu.weights import (
    LayerKind,
    PackedWeights,
    Shape,
    check_shape,
    idle_engine,
    packed_nbytes,
    told,
)
from microserve.kernels.kernel_cache import KernelUnavailable

TORCH_ELEMS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PAGE_NBYTES = 4096


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Tensors on the CPU. Matrices [out, in] in the shape's elem, also where they are packed to int8; norms
    and biases of any float type."""

    matrices: Mapping[str, Tensor]
    """By the names of ``Layer.WEIGHTS``."""
    vectors: Mapping[str, Tensor]
    """By the names of ``Layer.FLOATS``; of biases and of q_norm and k_norm only those that there are."""
    use_rope: bool = True
    window: int | None = None


def pack(
    library: Library,
    shape: Shape,
    layers: Sequence[LayerWeights],
    *,
    embedding: Tensor,
    head: Tensor | None,
    norm: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> PackedWeights:
    """In memory of this process; what was given is not needed afterwards.

    embedding, head: [vocab, hidden], head None for a tied one; norm: [hidden]; cos, sin: [positions,
    head_dim / 2]. The bounds of the shape do not matter. Raises :class:`KernelUnavailable` where there is no
    memory, ``ValueError`` for what is missing or of another shape.
    """
    check_shape(shape)
    shape = replace(shape, block_size=1, num_blocks=1, max_rows=1, max_context=1, max_logits=1)
    given = {"embedding": embedding, "head": head, "norm": norm, "cos": cos, "sin": sin}
    rows, table = (shape.vocab, shape.hidden), (len(cos), shape.head_dim // 2)
    shapes = {"embedding": rows, "head": rows, "norm": (shape.hidden,), "cos": table, "sin": table}
    for name, tensor in given.items():
        _check(name, tensor, shapes[name])
    if len(layers) != shape.num_layers:
        raise ValueError(f"{len(layers)} layers, and there have to be {shape.num_layers}")
    for layer in layers:
        _check_layer(shape, layer)
    kinds = tuple(_kind(layer) for layer in layers)
    packed = PackedWeights(np.empty(0, np.uint8), kinds, head is not None, len(cos))
    try:
        packed = replace(packed, memory=_page_aligned(packed_nbytes(library, shape, packed)))
    except MemoryError:
        raise KernelUnavailable("no memory for packed weights") from None
    _fill(library, shape, packed, layers, given)
    return packed


def _fill(
    library: Library,
    shape: Shape,
    packed: PackedWeights,
    layers: Sequence[LayerWeights],
    given: Mapping[str, Tensor | None],
) -> None:
    calls = library.calls
    engine = idle_engine(library, shape)
    try:
        calls.ms_place_weights(engine, packed.memory.ctypes.data, 0)
        for index, weights in enumerate(layers):
            layer, kept = Layer(), []
            for name, tensor in (*weights.matrices.items(), *weights.vectors.items()):
                kept.append(_plain(tensor, shape.elem if name in weights.matrices else "float32"))
                setattr(layer, name, kept[-1].data_ptr())
            told(calls.ms_set_layer(engine, index, ctypes.byref(layer)))
        model, kept = Model(num_positions=packed.num_positions), []
        for name, each in given.items():
            if each is not None:
                kept.append(_plain(each, shape.elem if name in ("embedding", "head") else "float32"))
                setattr(model, name, kept[-1].data_ptr())
        told(calls.ms_set_model(engine, ctypes.byref(model)))
    finally:
        calls.ms_destroy(engine)


def array_of(tensor: Tensor) -> npt.NDArray[np.uint16] | npt.NDArray[np.float32]:
    """The same memory; of bfloat16 the bits."""
    array: npt.NDArray[np.uint16] | npt.NDArray[np.float32]
    array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _page_aligned(nbytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed. Raises ``MemoryError``."""
    memory = np.zeros(nbytes + PAGE_NBYTES, np.uint8)
    begin = -memory.ctypes.data % PAGE_NBYTES
    return memory[begin : begin + nbytes]


def _kind(layer: LayerWeights) -> LayerKind:
    return LayerKind(
        tuple(name for name in Layer.FLOATS if name in layer.vectors), layer.use_rope, layer.window
    )


def _check_layer(s: Shape, weights: LayerWeights) -> None:
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


def _check(name: str, tensor: Tensor | None, wanted: tuple[int, ...]) -> None:
    if tensor is not None and (tuple(tensor.shape) != wanted or tensor.device.type != "cpu"):
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} on {tensor.device.type}, and has to be {wanted} on cpu"
        )


def _plain(tensor: Tensor, elem: str) -> Tensor:
    return tensor.detach().to(TORCH_ELEMS[elem]).contiguous()
