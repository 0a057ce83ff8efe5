"""Tiny random models of every family the native step knows, without transformers: their weights, and what the
class says of them (``cpu_class``).

    model = TinyModel("qwen3")      model.sequence(ids, wanted)      KV of all positions, logits of some

Must not know the step (family_step.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microserve.kernels.cpu.library import Library
from microserve.kernels.cpu.packing import TORCH_ELEMS, LayerWeights, pack
from microserve.kernels.cpu.weights import PackedWeights, Shape
from tests.support.kernels import cpu_class
from tests.support.kernels.cpu_class import Floats

NUM_LAYERS, VOCAB, BLOCK_SIZE, NUM_BLOCKS = 2, 72, 16, 96
NUM_POSITIONS = BLOCK_SIZE * NUM_BLOCKS
"""That a pool holds, whatever the size of its blocks."""


@dataclass(frozen=True)
class Family:
    """What sets a family's layers apart, at sizes that no register divides."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int = 44
    tied: bool = False
    biases: Sequence[str] = ()
    head_norms: bool = False
    windows: tuple[int | None, ...] = (None, None)
    rope: tuple[bool, ...] = (True, True)
    block_size: int = BLOCK_SIZE


FAMILIES = {
    "llama": Family(9, 3, 8, 72, tied=True),
    "mistral": Family(4, 2, 80, 48, windows=(24, 24)),
    "qwen2": Family(5, 1, 16, 40, biases=("q", "k", "v"), windows=(None, 300)),
    "qwen3": Family(3, 3, 64, 40, head_norms=True),
    "smollm3": Family(8, 2, 64, 64, intermediate=96, tied=True, rope=(True, False)),
    "biased": Family(2, 1, 16, 33, intermediate=31, biases=("q", "k", "v", "o"), head_norms=True),
}
"""Grouped heads 1 to 5; widths in whole blocks of 32 and not."""
TILED = Family(6, 2, 32, hidden=64, intermediate=96)
"""Of no real family: each size is one of whole tiles."""


def bytes_of(values: Any) -> bytes:
    """Of floats, every NaN the same: which one it is depends on the order of operands, and means nothing."""
    array = np.array(values, np.float32)
    array[np.isnan(array)] = np.nan
    return array.tobytes()


class TinyModel:
    """Weights of one family, by name or by its sizes, the recipe by which they are multiplied, and how they
    stand. ``scale`` is how large they are."""

    def __init__(
        self,
        family: str | Family,
        elem: str = "bfloat16",
        recipe: str = "cpu1",
        seed: int = 0,
        scale: float = 0.3,
        weights: str = "dtype",
    ) -> None:
        self.elem, self.recipe, self.weights = elem, recipe, weights
        self.config = FAMILIES[family] if isinstance(family, str) else family
        self._random = torch.Generator().manual_seed(seed)
        self._scale = scale
        c = self.config
        self.layers = [self._layer(number) for number in range(NUM_LAYERS)]
        self.embedding = self._weights(VOCAB, c.hidden)
        self.head = None if c.tied else self._weights(VOCAB, c.hidden)
        self.norm = self._weights(c.hidden).float() + 1.0
        angles = np.outer(np.arange(NUM_POSITIONS), 0.02 ** np.linspace(0, 1, c.head_dim // 2))
        self.cos, self.sin = (torch.from_numpy(f(angles).astype(np.float32)) for f in (np.cos, np.sin))

    def _weights(self, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=self._random) * self._scale
        return values.to(TORCH_ELEMS[self.elem])

    def _layer(self, number: int) -> LayerWeights:
        c = self.config
        queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        outs = {"q": queries, "k": keys, "v": keys, "o": c.hidden}
        matrices = {name: self._weights(out, c.hidden) for name, out in outs.items() if name != "o"}
        matrices["o"] = self._weights(c.hidden, queries)
        matrices |= {name: self._weights(c.intermediate, c.hidden) for name in ("gate", "up")}
        matrices["down"] = self._weights(c.hidden, c.intermediate)
        vectors = {f"{name}_norm": self._weights(c.hidden) + 1.0 for name in ("attention", "mlp")}
        vectors |= {f"{name}_bias": self._weights(outs[name]) for name in c.biases}
        if c.head_norms:
            vectors |= {f"{name}_norm": self._weights(c.head_dim) + 1.0 for name in ("q", "k")}
        return LayerWeights(matrices, vectors, use_rope=c.rope[number], window=c.windows[number])

    def shape(self, **bounds: Any) -> Shape:
        c = self.config
        sizes = (c.num_heads, c.num_kv_heads, c.head_dim, c.hidden, c.intermediate, VOCAB)
        blocks = (c.block_size, -(-NUM_POSITIONS // c.block_size))
        limits: dict[str, Any] = {"max_rows": 512, "max_context": NUM_POSITIONS, "max_logits": 64} | bounds
        limits["weights"] = self.weights
        return Shape(self.elem, NUM_LAYERS, *sizes, 1e-5, c.head_dim**-0.5, *blocks, **limits)

    def packed(self, found: Library, **changed: Any) -> PackedWeights:
        """``changed``: layers, embedding, head, norm, cos or sin."""
        names = ("layers", "embedding", "head", "norm", "cos", "sin")
        given: dict[str, Any] = {name: getattr(self, name) for name in names} | changed
        return pack(found, self.shape(), **given)

    def sequence(
        self, ids: Sequence[int], wanted: Sequence[int]
    ) -> tuple[list[tuple[Floats, Floats]], Floats]:
        """By the class's own account: K and V [positions, kv_heads, head_dim] of each layer, and logits of
        the positions ``wanted``."""
        c, elem = self.config, self.elem
        length = len(ids)
        x = self.embedding.float().numpy()[np.array(ids)]
        cos, sin = self.cos.numpy()[:length], self.sin.numpy()[:length]
        stored = []
        for layer in self.layers:
            w = {
                name: tensor.float().numpy()
                for name, tensor in (*layer.matrices.items(), *layer.vectors.items())
            }
            a = cpu_class.rounded(elem, cpu_class.normed(x, w["attention_norm"], 1e-5))
            q, k, v = (self._heads(a, w, name, cos, sin, layer.use_rope) for name in "qkv")
            finite = cpu_class.FINITE[elem]
            k, v = (cpu_class.rounded(elem, np.clip(each, -finite, finite)) for each in (k, v))
            stored.append((k, v))
            q, group = cpu_class.rounded(elem, q), c.num_heads // c.num_kv_heads
            heads = [
                cpu_class.attended(
                    *(self.recipe, elem),
                    *(q[:, h], k[:, h // group], v[:, h // group]),
                    *(c.head_dim**-0.5, layer.window or 0),
                )
                for h in range(c.num_heads)
            ]
            a = cpu_class.rounded(elem, np.concatenate(heads, axis=1))
            x = self._product(x, a, w["o"])
            if "o_bias" in w:
                x = cpu_class.add(x, w["o_bias"])
            a = cpu_class.rounded(elem, cpu_class.normed(x, w["mlp_norm"], 1e-5))
            gate, up = (self._product(None, a, w[name]) for name in ("gate", "up"))
            a = cpu_class.rounded(elem, cpu_class.mul(cpu_class.silu(gate), up))
            x = self._product(x, a, w["down"])
        a = cpu_class.rounded(elem, cpu_class.normed(x[list(wanted)], self.norm.numpy(), 1e-5))
        head = self.embedding if self.head is None else self.head
        return stored, self._product(None, a, head.float().numpy())

    def _product(self, c: Floats | None, a: Floats, b: Floats) -> Floats:
        if self.weights == "int8":
            return cpu_class.product_int8(self.recipe, c, a, b)
        return cpu_class.product(self.recipe, 0.0 if c is None else c, a, b)

    def _heads(self, a: Floats, w: dict[str, Any], name: str, cos: Floats, sin: Floats, rope: bool) -> Floats:
        x = self._product(None, a, w[name])
        if f"{name}_bias" in w:
            x = cpu_class.add(x, w[f"{name}_bias"])
        x = x.reshape(len(a), -1, self.config.head_dim)
        if f"{name}_norm" in w:
            x = cpu_class.normed(x, w[f"{name}_norm"], 1e-5)
        return cpu_class.rotated(x, cos, sin) if rope and name != "v" else x


def class_bytes(kv: Sequence[tuple[Floats, Floats]], length: int) -> bytes:
    """What ``Room.stored`` is, of ``TinyModel.sequence``."""
    return b"".join(bytes_of(np.stack([k[:length], v[:length]], axis=1)) for k, v in kv)


def random_ids(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB, length)]
