"""Steps of tiny models (family.py) by the native step, over poisoned pools.

    room = Room(model, threads=2)      room.run([Part(ids, 0, 17, table), ...])      rows of some sequences
    streams = Streams(room, 3)         streams.run([(0, 17), (2, 1)])                so many more rows of each

Owns pools, blocks and batches. Must not know what is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from microserve.kernels.cpu.library import ELEMS, VARIANTS, Library, library
from microserve.kernels.cpu.packing import TORCH_ELEMS, array_of
from microserve.kernels.cpu.step import CpuStep
from tests.support.kernels.cpu_class import Floats
from tests.support.kernels.family import NUM_LAYERS, NUM_POSITIONS, VOCAB, TinyModel, bytes_of

POISONS = {"nan": (0xFFFF,), "infinity": (0x7F80,), "zero": (0,), "mixed": (0x7FC1, 0x7F80, 0xFF80, 0xFFFF)}
"""What the elements of a pool are before anything is written, the upper halves of floats in turn."""


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
    """A step over a pool of its own, poisoned; close it. ``found``: by another library than engines load."""

    model: TinyModel
    variant: str = "portable"
    threads: int = 1
    poison: str = "nan"
    bounds: dict[str, int] = field(default_factory=dict)
    found: Library | None = None
    is_layerwise: bool = True

    def __post_init__(self) -> None:
        m, c = self.model, self.model.config
        found, shape = self.found or library(), m.shape(**self.bounds)
        dims = (shape.num_blocks, 2, c.block_size, c.num_kv_heads, c.head_dim)
        halves = np.resize(np.array(POISONS[self.poison], np.uint16), dims)
        values = halves if m.elem == "bfloat16" else halves.astype(np.uint32) << 16
        elem = TORCH_ELEMS[m.elem]
        self.pool = [torch.from_numpy(values.view(np.uint8)).clone().view(elem) for _ in range(NUM_LAYERS)]
        pool = [array_of(kv) for kv in self.pool]
        self.step = CpuStep(found, self.variant, shape, self.threads, m.packed(found), pool, m.recipe)

    def run(self, parts: Sequence[Part], on_layer: Callable[[int], None] | None = None) -> list[bytes | None]:
        """Bits of the logits behind each part's last row; None where they are not wanted."""
        last = np.cumsum([part.end - part.start for part in parts]) - 1
        wanted = [row for row, part in zip(last, parts, strict=True) if part.wants_logits]
        rows = iter(self.logits(parts, wanted, on_layer))
        return [bytes_of(next(rows)) if part.wants_logits else None for part in parts]

    def logits(
        self, parts: Sequence[Part], rows: Sequence[int], on_layer: Callable[[int], None] | None = None
    ) -> Floats:
        """[rows, vocab] of rows of the whole step."""
        size = self.model.config.block_size
        at = [np.arange(part.start, part.end) for part in parts]
        tokens = np.concatenate([np.array(p.ids)[where] for p, where in zip(parts, at, strict=True)])
        slots = [
            np.where(where < p.write_from, -1, np.array(p.table)[where // size] * size + where % size)
            for p, where in zip(parts, at, strict=True)
        ]
        spans = [(p.end - p.start, p.end, list(p.table)) for p in parts]
        wanted = np.array(rows, np.int64)
        given = (tokens, np.concatenate(at), np.concatenate(slots), spans, wanted)
        logits = self.step.run(*given, on_layer, self.is_layerwise)
        return np.ascontiguousarray(logits)

    def stored(self, table: Sequence[int], length: int) -> bytes:
        """Bits of the KV of a sequence's positions, all layers."""
        at, size = np.arange(length), self.model.config.block_size
        blocks, rows = torch.from_numpy(np.array(table)[at // size]), torch.from_numpy(at % size)
        return b"".join(bytes_of(layer[blocks, :, rows].float().numpy()) for layer in self.pool)

    def whole_pool(self) -> list[bytes]:
        """Of each layer, what nobody wrote included."""
        return [layer.view(torch.uint8).numpy().tobytes() for layer in self.pool]

    def close(self) -> None:
        self.step.close()


class Streams:
    """Sequences that go on by some rows a step, in blocks that neither follow each other nor ascend."""

    def __init__(self, room: Room, count: int) -> None:
        self.room = room
        order = np.random.default_rng(11).permutation(room.step.shape.num_blocks)
        self._tables = [[int(block) for block in blocks] for blocks in np.array_split(order, count)]
        self._ends = [0] * count

    def run(self, rows: Sequence[tuple[int, int]]) -> Floats:
        """A step: of each (sequence, number) its next rows. Logits of all of them, in this order."""
        parts = []
        for sequence, number in rows:
            start = self._ends[sequence]
            self._ends[sequence] = end = start + number
            ids = (np.arange(NUM_POSITIONS) * 7 + sequence * 13 + np.arange(NUM_POSITIONS) // 3) % VOCAB
            parts.append(Part(ids.tolist(), start, end, self._tables[sequence]))
        return self.room.logits(parts, range(sum(number for _, number in rows)))


def variants(elem: str = "bfloat16", recipe: str = "cpu1") -> list[str]:
    """That this machine has, and that compute so: the same bits by all of them."""
    return [name for name in VARIANTS if recipe in library().recipes(name, elem)]


def ways() -> list[tuple[str, str, str]]:
    """Variant, recipe and elem of all that this machine can compute."""
    return [(name, recipe, elem) for recipe, elem in ELEMS for name in variants(elem, recipe)]
