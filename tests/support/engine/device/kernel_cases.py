"""Random work for kernels, built the same for a CPU, Triton's interpreter and a GPU."""

from __future__ import annotations

import ctypes
import itertools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microserve.kernels.attention.gpu_attention import DeviceBatch
from microserve.kernels.cuda_module import SOURCES, Launch


@dataclass(frozen=True)
class AttentionCase:
    """Sequences with as many new tokens and as long contexts as ``spans`` says; those of one token first.

    A context of 0 is a place without a sequence, as a captured graph has them.
    """

    block_size: int
    num_kv_heads: int
    share: int
    head_dim: int
    window: int | None
    decodes: list[int]
    """Contexts; 0 for a place without a sequence."""
    prefills: list[tuple[int, int]]
    """(new tokens, context); both 0 for a place without a sequence."""
    seed: int

    def build(self, dtype: torch.dtype, device: str = "cpu") -> AttentionWork:
        """Rows that belong to no sequence hold NaN, which must reach no result, nor may table garbage."""
        generator = torch.Generator().manual_seed(self.seed)
        spans = [(1, context) for context in self.decodes] + self.prefills
        size = self.block_size
        needed = [-(-context // size) for _, context in spans]
        free = iter(torch.randperm(sum(needed) + 1, generator=generator).tolist())
        shape = (sum(needed) + 1, 2, size, self.num_kv_heads, self.head_dim)
        kv = torch.full(shape, float("nan"), dtype=dtype)
        tables = torch.full((len(spans), max(needed) + 1), 1 << 30, dtype=torch.int32)
        lists = []
        for place, (_, context) in enumerate(spans):
            table = list(itertools.islice(free, needed[place]))
            lists.append(table)
            tables[place, : len(table)] = torch.tensor(table, dtype=torch.int32)
            rows = torch.randn(context, 2, self.num_kv_heads, self.head_dim, generator=generator).to(dtype)
            positions = torch.arange(context)
            blocks = torch.tensor(table, dtype=torch.int64)[positions // size]
            kv[blocks, :, positions % size] = rows
        lengths = [query_len for query_len, _ in spans]
        starts = [0, *itertools.accumulate(lengths)]
        num_heads = self.num_kv_heads * self.share
        query = torch.randn(starts[-1], num_heads, self.head_dim, generator=generator).to(dtype)
        batch = DeviceBatch(
            query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
            context_lens=torch.tensor([context for _, context in spans], dtype=torch.int32, device=device),
            block_tables=tables.to(device),
            num_decodes=len(self.decodes),
        )
        return AttentionWork(query.to(device), kv.to(device), batch, spans, lists)


@dataclass(frozen=True)
class AttentionWork:
    query: Tensor
    kv: Tensor
    batch: DeviceBatch
    spans: list[tuple[int, int]]
    tables: list[list[int]]

    def expected(self, scale: float, window: int | None) -> Tensor:
        """The oracle's answer, on the CPU; zeros for places without a sequence."""
        from microserve.kernels import reference

        query, kv = self.query.cpu(), self.kv.cpu()
        out = torch.zeros_like(query)
        begin = 0
        for (query_len, context), table in zip(self.spans, self.tables, strict=True):
            rows = slice(begin, begin + query_len)
            begin += query_len
            if context:
                span = [(query_len, context, table)]
                out[rows] = reference.paged_attention(
                    query[rows], kv, span, scale=scale, sliding_window=window
                )
        return out


def random_slots(num_tokens: int, num_slots: int, skipped: float, generator: torch.Generator) -> Tensor:
    """[num_tokens] int64, no slot twice; about a share of ``skipped`` are outside of [0, num_slots)."""
    slots = torch.randperm(num_slots, generator=generator)[:num_tokens]
    dropped = torch.rand(num_tokens, generator=generator) < skipped
    outside = torch.tensor([-1, num_slots, -(1 << 40), 1 << 40])
    chosen = outside[torch.randint(0, 4, (num_tokens,), generator=generator)]
    return torch.where(dropped, chosen, slots)


def declared(module: str) -> list[tuple[str, str]]:
    """(type, name) of the parameters of the kernels in ``cuda/<module>.cu``, all of which take the same."""
    source = (SOURCES / f"{module}.cu").read_text().replace("\\\n", "\n")
    (parameters,) = re.findall(r"__global__[^{]*?\(256\)\s*\w+\(([^)]*)\)", source)
    pairs = (parameter.split() for parameter in parameters.split(","))
    return [(" ".join(words[:-1]), words[-1]) for words in pairs]


def emulate(function: Any, launch: Launch, *more: int) -> None:
    """A launch on the CPU: its own arguments, then ``more`` and its shape."""
    numbers = [ctypes.c_uint32(number) for number in (*more, *launch.grid, *launch.block)]
    wide = {4: ctypes.c_uint32, 8: ctypes.c_int64}
    arguments = [
        wide[argument.itemsize](int(np.asarray(argument).astype(np.int64))) for argument in launch.arguments
    ]
    assert function(*arguments, *numbers) == 0
