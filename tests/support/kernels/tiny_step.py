"""Tiny models on the native CPU step, over a pool full of NaN: one schedule of rows, whatever the variant.

Owns random weights, blocks and batches. Must not know what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from microserve.kernels.cpu.library import Library
from microserve.kernels.cpu.step import CpuStep, LayerWeights, Shape

POISON = (0x7FC1, 0x7F80, 0xFF80, 0xFFFF)
"""bf16 of a NaN, of infinities, of another NaN."""


@dataclass(frozen=True)
class TinyModel:
    """Of two layers; ``group`` query heads a KV head."""

    head_dim: int = 32
    group: int = 3
    num_kv_heads: int = 2
    hidden: int = 64
    intermediate: int = 96
    vocab: int = 50
    block_size: int = 16
    window: int | None = None
    elem: str = "bfloat16"
    with_biases: bool = False
    """Of q, k, v and o; and norms of q and k."""
    max_rows: int = 160
    max_context: int = 640
    seed: int = 1

    def shape(self, num_blocks: int) -> Shape:
        heads = self.group * self.num_kv_heads
        sizes = (heads, self.num_kv_heads, self.head_dim, self.hidden, self.intermediate, self.vocab)
        bounds = (self.block_size, num_blocks, self.max_rows, self.max_context, self.max_rows)
        return Shape(self.elem, 2, *sizes, 1e-5, self.head_dim**-0.5, *bounds)

    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.elem == "bfloat16" else torch.float32


class TinyStep:
    """A model of random weights by one variant. ``run`` gives the logits of all rows, as bits."""

    def __init__(
        self, library: Library, variant: str, model: TinyModel, sequences: int, threads: int
    ) -> None:
        self.model = model
        per_sequence = -(-model.max_context // model.block_size)
        self.shape = model.shape(sequences * per_sequence)
        random = torch.Generator().manual_seed(model.seed)
        # Blocks of a sequence neither follow each other nor ascend.
        order = torch.randperm(self.shape.num_blocks, generator=random).tolist()
        self.tables = [order[i * per_sequence : (i + 1) * per_sequence] for i in range(sequences)]
        self.contexts = [0] * sequences
        self.step = CpuStep(library, variant, self.shape, threads)
        self.pool = [self._poisoned() for _ in range(2)]
        for index, kv in enumerate(self.pool):
            self.step.set_layer(index, self._layer(random), kv)
        angles = torch.outer(
            torch.arange(model.max_context),
            10_000.0 ** (-torch.arange(model.head_dim // 2) / model.head_dim * 2),
        )
        embedding = self._matrix(random, model.vocab, model.hidden, 1.0)
        norm = 1 + torch.rand(model.hidden, generator=random) / 4
        self.step.set_model(embedding, None, norm, angles.cos(), angles.sin())

    def run(self, counts: Sequence[tuple[int, int]]) -> np.ndarray:
        """A step: of each (sequence, count) the next ``count`` of its tokens. [rows, vocab] as uint32."""
        tokens, positions, slots, spans = [], [], [], []
        for sequence, count in counts:
            table, first = self.tables[sequence], self.contexts[sequence]
            self.contexts[sequence] += count
            for position in range(first, first + count):
                tokens.append((position * 7 + sequence * 13 + position // 3) % self.model.vocab)
                positions.append(position)
                block, row = divmod(position, self.model.block_size)
                slots.append(table[block] * self.model.block_size + row)
            spans.append((count, first + count, table))
        arrays = [np.array(values, np.int64) for values in (tokens, positions, slots, range(len(tokens)))]
        logits = self.step.run(arrays[0], arrays[1], arrays[2], spans, arrays[3])
        return logits.contiguous().numpy().view(np.uint32)

    def kv(self) -> list[bytes]:
        """Of both layers, what nobody wrote included."""
        return [bytes(kv.view(torch.uint8).numpy()) for kv in self.pool]

    def _poisoned(self) -> Tensor:
        shape = self.shape
        dims = (shape.num_blocks, 2, shape.block_size, shape.num_kv_heads, shape.head_dim)
        if self.model.elem != "bfloat16":
            return torch.full(dims, float("nan"))
        size = int(np.prod(dims))
        poison = np.resize(np.array(POISON, np.uint16), size).view(np.int16)
        return torch.from_numpy(poison.copy()).view(torch.bfloat16).reshape(dims)

    def _matrix(self, random: torch.Generator, rows: int, columns: int, scale: float) -> Tensor:
        return (torch.randn(rows, columns, generator=random) * scale).to(self.model.dtype())

    def _layer(self, random: torch.Generator) -> LayerWeights:
        model = self.model
        wide, narrow = model.group * model.num_kv_heads * model.head_dim, model.num_kv_heads * model.head_dim
        sizes = {
            "q": (wide, model.hidden),
            "k": (narrow, model.hidden),
            "v": (narrow, model.hidden),
            "o": (model.hidden, wide),
            "gate": (model.intermediate, model.hidden),
            "up": (model.intermediate, model.hidden),
            "down": (model.hidden, model.intermediate),
        }
        matrices = {name: self._matrix(random, *size, size[1] ** -0.5) for name, size in sizes.items()}
        lengths = {"attention_norm": model.hidden, "mlp_norm": model.hidden}
        if model.with_biases:
            lengths |= {"q_norm": model.head_dim, "k_norm": model.head_dim}
            lengths |= {"q_bias": wide, "k_bias": narrow, "v_bias": narrow, "o_bias": model.hidden}
        vectors = {name: 1 + torch.rand(size, generator=random) / 4 for name, size in lengths.items()}
        return LayerWeights(matrices, vectors, window=model.window)
