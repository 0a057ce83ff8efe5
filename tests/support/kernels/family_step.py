"""Tiny random models for the native step, without transformers: their weights, their pools, steps over them,
and what the class says of them (``cpu_class``).

    model = TinyModel(family="qwen3")      model.sequence(ids)      the class: KV and logits of all positions
    room = Room(model, threads=2)          room.extend(table, ...)  the step: rows of any number of sequences
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microserve.kernels.cpu.library import VARIANTS, library
from microserve.kernels.cpu.step import TORCH_ELEMS, CpuStep, LayerWeights, Shape
from tests.support.kernels import cpu_class
from tests.support.kernels.cpu_class import Floats

NUM_LAYERS, VOCAB, BLOCK_SIZE, NUM_BLOCKS = 2, 72, 16, 96
POISONS = {"nan": 0xFF, "infinity": None, "zero": 0x00}
"""What a byte of a pool is before anything is written; of infinities every element is one."""


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


FAMILIES = {
    "llama": Family(9, 3, 8, 72, tied=True),
    "mistral": Family(4, 2, 80, 48, windows=(24, 24)),
    "qwen2": Family(5, 1, 16, 40, biases=("q", "k", "v"), windows=(None, 300)),
    "qwen3": Family(3, 3, 64, 40, head_norms=True),
    "smollm3": Family(8, 2, 64, 64, intermediate=96, tied=True, rope=(True, False)),
    "biased": Family(2, 1, 16, 33, intermediate=31, biases=("q", "k", "v", "o"), head_norms=True),
}
"""Grouped heads 1 to 5; widths in whole blocks of 32 and not."""


def bytes_of(values: Any) -> bytes:
    """Of floats, every NaN the same: which one it is depends on the order of operands, and means nothing."""
    array = np.array(values, np.float32)
    array[np.isnan(array)] = np.nan
    return array.tobytes()


class TinyModel:
    """Weights of one family. ``scale`` is how large they are."""

    def __init__(self, family: str, elem: str = "bfloat16", seed: int = 0, scale: float = 0.3) -> None:
        self.family, self.elem, self.config = family, elem, FAMILIES[family]
        self._random = torch.Generator().manual_seed(seed)
        self._scale = scale
        c = self.config
        self.layers = [self._layer(number) for number in range(NUM_LAYERS)]
        self.embedding = self._weights(VOCAB, c.hidden)
        self.head = None if c.tied else self._weights(VOCAB, c.hidden)
        self.norm = self._weights(c.hidden).float() + 1.0
        angles = np.outer(np.arange(BLOCK_SIZE * NUM_BLOCKS), 0.02 ** np.linspace(0, 1, c.head_dim // 2))
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
        sizes: dict[str, Any] = {
            "max_rows": 512,
            "max_context": BLOCK_SIZE * NUM_BLOCKS,
            "max_logits": 64,
        } | bounds
        return Shape(
            *(
                self.elem,
                NUM_LAYERS,
                c.num_heads,
                c.num_kv_heads,
                c.head_dim,
                c.hidden,
                c.intermediate,
                VOCAB,
            ),
            *(1e-5, c.head_dim**-0.5, BLOCK_SIZE, NUM_BLOCKS),
            **sizes,
        )

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
                    elem, q[:, h], k[:, h // group], v[:, h // group], c.head_dim**-0.5, layer.window or 0
                )
                for h in range(c.num_heads)
            ]
            a = cpu_class.rounded(elem, np.concatenate(heads, axis=1))
            x = cpu_class.product(x, a, w["o"])
            if "o_bias" in w:
                x = cpu_class.add(x, w["o_bias"])
            a = cpu_class.rounded(elem, cpu_class.normed(x, w["mlp_norm"], 1e-5))
            gate, up = (cpu_class.product(0.0, a, w[name]) for name in ("gate", "up"))
            a = cpu_class.rounded(elem, cpu_class.mul(cpu_class.silu(gate), up))
            x = cpu_class.product(x, a, w["down"])
        a = cpu_class.rounded(elem, cpu_class.normed(x[list(wanted)], self.norm.numpy(), 1e-5))
        head = self.embedding if self.head is None else self.head
        return stored, cpu_class.product(0.0, a, head.float().numpy())

    def _heads(self, a: Floats, w: dict[str, Any], name: str, cos: Floats, sin: Floats, rope: bool) -> Floats:
        x = cpu_class.product(0.0, a, w[name])
        if f"{name}_bias" in w:
            x = cpu_class.add(x, w[f"{name}_bias"])
        x = x.reshape(len(a), -1, self.config.head_dim)
        if f"{name}_norm" in w:
            x = cpu_class.normed(x, w[f"{name}_norm"], 1e-5)
        return cpu_class.rotated(x, cos, sin) if rope and name != "v" else x


@dataclass(frozen=True)
class Part:
    """Some rows of one sequence in a step: tokens ``ids[start:end]``, whose KV is written from ``write_from``
    on."""

    ids: Sequence[int]
    start: int
    end: int
    table: Sequence[int]
    write_from: int = 0
    wants_logits: bool = True


@dataclass
class Room:
    """A step over a pool of its own, poisoned; close it."""

    model: TinyModel
    variant: str = "portable"
    threads: int = 1
    poison: str = "nan"
    bounds: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        c = self.model.config
        shape = (NUM_BLOCKS, 2, BLOCK_SIZE, c.num_kv_heads, c.head_dim)
        self.pool = [torch.empty(shape, dtype=TORCH_ELEMS[self.model.elem]) for _ in range(NUM_LAYERS)]
        for layer in self.pool:
            if (byte := POISONS[self.poison]) is None:
                layer.fill_(torch.inf)
            else:
                layer.view(torch.uint8).fill_(byte)
        self.step = CpuStep(library(), self.variant, self.model.shape(**self.bounds), self.threads)
        for number, (weights, kv) in enumerate(zip(self.model.layers, self.pool, strict=True)):
            self.step.set_layer(number, weights, kv)
        m, end = self.model, self.step.shape.max_context
        self.step.set_model(m.embedding, m.head, m.norm, m.cos[:end], m.sin[:end])

    def run(self, parts: Sequence[Part], on_layer: Callable[[int], None] | None = None) -> list[bytes | None]:
        """Bits of the logits behind each part's last row; None where they are not wanted."""
        at = [np.arange(part.start, part.end) for part in parts]
        tokens = np.concatenate([np.array(p.ids)[where] for p, where in zip(parts, at, strict=True)])
        slots = [
            np.where(
                where < p.write_from,
                -1,
                np.array(p.table)[where // BLOCK_SIZE] * BLOCK_SIZE + where % BLOCK_SIZE,
            )
            for p, where in zip(parts, at, strict=True)
        ]
        last = np.cumsum([len(where) for where in at]) - 1
        wanted = np.array([row for row, p in zip(last, parts, strict=True) if p.wants_logits], np.int64)
        spans = [(p.end - p.start, p.end, list(p.table)) for p in parts]
        logits = self.step.run(tokens, np.concatenate(at), np.concatenate(slots), spans, wanted, on_layer)
        rows = iter(logits.numpy())
        return [bytes_of(next(rows)) if p.wants_logits else None for p in parts]

    def stored(self, table: Sequence[int], length: int) -> bytes:
        """Bits of the KV of a sequence's positions, all layers."""
        at = np.arange(length)
        blocks, rows = torch.from_numpy(np.array(table)[at // BLOCK_SIZE]), torch.from_numpy(at % BLOCK_SIZE)
        return b"".join(bytes_of(layer[blocks, :, rows].float().numpy()) for layer in self.pool)

    def close(self) -> None:
        self.step.close()


def variants() -> list[str]:
    """That this machine has."""
    return [name for name in VARIANTS if library().supports(name)]


def class_bytes(kv: Sequence[tuple[Floats, Floats]], length: int) -> bytes:
    """What ``Room.stored`` is, of ``TinyModel.sequence``."""
    return b"".join(bytes_of(np.stack([k[:length], v[:length]], axis=1)) for k, v in kv)


def random_ids(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB, length)]
