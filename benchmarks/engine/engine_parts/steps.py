"""Steps of the demo model by both ways to compute them, over one pool.

Owns which steps those are, and how many bytes a decode must read. A kind's sequences share no block.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from microserve.kvcache.layout import KvLayout
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Batch, Chunk, SampleSpec
from microserve.services.engine.model.model import LoadedModel, load_model
from microserve.services.engine.model.runner import ModelRunner
from microserve.services.engine.native.packing import native_runner
from microserve.services.engine.native.runner import NativeRunner
from microserve.services.local.demo.model import default_cache, fetch

NUM_BLOCKS, BLOCK_SIZE, CHUNK_TOKENS = 1024, 16, 512
MAX_ROWS, MAX_TOKEN = 512, 256


@dataclass(frozen=True, slots=True)
class Kind:
    name: str
    batches: list[Batch]
    """Executed one after the other."""
    num_tokens: int
    kv_tokens: int
    """Read by a decode; 0: a prefill, which computing bounds and not memory."""


def decode(num_streams: int, context: int) -> Kind:
    """One step of sequences that have ``context`` tokens with the new one."""
    chance = random.Random(num_streams * 10_007 + context)
    blocks = chance.sample(range(NUM_BLOCKS), num_streams * -(-context // BLOCK_SIZE))
    chunks = []
    for number in range(num_streams):
        table = blocks[number::num_streams]
        chunks.append(_chunk(number, [chance.randrange(MAX_TOKEN)], context - 1, table, samples=True))
    return Kind(f"decode {num_streams} at {context}", [Batch(chunks)], num_streams, num_streams * context)


def prefill(num_tokens: int) -> Kind:
    """A whole prompt, in the chunks of an engine."""
    chance = random.Random(num_tokens)
    table = chance.sample(range(NUM_BLOCKS), -(-num_tokens // BLOCK_SIZE))
    batches = []
    for start in range(0, num_tokens, CHUNK_TOKENS):
        tokens = [chance.randrange(MAX_TOKEN) for _ in range(min(CHUNK_TOKENS, num_tokens - start))]
        end = start + len(tokens)
        held = table[: -(-end // BLOCK_SIZE)]
        batches.append(Batch([_chunk(0, tokens, start, held, samples=end == num_tokens)]))
    return Kind(f"prefill {num_tokens:,}", batches, num_tokens, 0)


def _chunk(number: int, tokens: list[int], start: int, table: list[int], *, samples: bool) -> Chunk:
    spec = SampleSpec(SamplingParams(temperature=0.0), tokens, [1], frozenset()) if samples else None
    return Chunk(number, tokens, start, table, start, spec)


def demo_model(model: str = "") -> str:
    """Its directory, or the one given."""
    return model or str(fetch(default_cache(os.environ), lambda what, part: None))


class Engine:
    """A loaded model and its pool; ``native`` and ``transformers`` compute over the same one."""

    def __init__(self, model: str, dtype: str) -> None:
        self.model: LoadedModel = load_model(demo_model(model), dtype=dtype)
        spec = self.model.spec
        self.layout = KvLayout(
            spec.name, spec.num_layers, NUM_BLOCKS, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim, spec.dtype
        )
        self._pool = np.zeros(self.layout.data_nbytes, np.uint8)
        # Values as they come: zeros would be quicker in some sums, and noise of all bits has NaN in it.
        torch_type = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        torch.from_numpy(self._pool).view(torch_type).normal_(0, 1)

    def transformers(self) -> ModelRunner:
        return ModelRunner(self.model, self._pool, NUM_BLOCKS, BLOCK_SIZE)

    def native(self, threads: int, variant: str = "auto", weights: str = "dtype") -> NativeRunner:
        """Raises :class:`KernelUnavailable` where it cannot be had."""
        how = {"threads": threads, "max_rows": MAX_ROWS, "variant": variant, "weights": weights}
        return native_runner(self.model, self._pool, NUM_BLOCKS, BLOCK_SIZE, **how)  # type: ignore[arg-type]

    def read_nbytes(self, kind: Kind) -> int:
        """What a decode cannot but read: all weights once, and the KV of its contexts."""
        module = self.model.module
        weights = {each.data_ptr(): each.numel() * each.element_size() for each in module.parameters()}
        kv_nbytes = self.layout.block_nbytes * self.layout.num_layers // BLOCK_SIZE
        return sum(weights.values()) + kind.kv_tokens * kv_nbytes


def timed_ms(
    runner: ModelRunner | NativeRunner, kind: Kind, times: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Milliseconds of one of ``times`` runs in a row; what a decode finds cold is warmed by one before."""
    if kind.kv_tokens:
        runner.execute(kind.batches[0])
    began = clock()
    for _ in range(times):
        for batch in kind.batches:
            runner.execute(batch)
    return (clock() - began) * 1e3 / times
