"""How far logits in bf16 may be from logits in fp32 of the very same weights, seen as log-probabilities.

The weights of tiny models (tiny_model.py) are wild, so that a fault shows: a prompt that loses a block of KV
leaves these bounds far behind, and rounding to bf16 uses up about half of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.torch import load_file, save_file

from microserve.kvcache.layout import KvLayout
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Batch, Chunk, Runner, SampleSpec
from microserve.services.engine.model.spec import ModelSpec
from tests.support.engine.model.tiny_model import make_tiny_model

MAX_MEAN_DIFFERENCE = 0.3
"""Of one position's log-probabilities, over the vocabulary."""
MAX_DIVERGENCE = 0.06
"""Kullback-Leibler, of one position's distribution from that in fp32, in nats."""

NUM_BLOCKS, BLOCK_SIZE, VOCAB = 64, 16, 320
LENGTHS = (2, 17, 34, 91, 130)
_BLOCKS_EACH = -(-max(LENGTHS) // BLOCK_SIZE)

Floats = npt.NDArray[np.float64]


def make_model(directory: Path, family: str) -> Path:
    """A tiny model whose weights bf16 holds exactly: what differs is computing."""
    make_tiny_model(directory, family, VOCAB, head_dim=64)
    file = directory / "model.safetensors"
    weights = {name: weight.bfloat16().float() for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return directory


def layout_of(spec: ModelSpec) -> KvLayout:
    return KvLayout(
        model=spec.name,
        num_layers=spec.num_layers,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
    )


def block_tables() -> list[list[int]]:
    """Of each prompt; scattered, so that a table that is not followed shows."""
    blocks = random.Random(2).sample(range(NUM_BLOCKS), len(LENGTHS) * _BLOCKS_EACH)
    return [blocks[start : start + _BLOCKS_EACH] for start in range(0, len(blocks), _BLOCKS_EACH)]


def log_probabilities(runner: Runner, before_last: Callable[[], None] = lambda: None) -> Floats:
    """[3 * len(LENGTHS), VOCAB]: of prompts that run together, behind a first part, a second one that
    attends to it, and a last token alone, as a decode. ``before_last`` is called before that one."""
    chance = random.Random(1)
    prompts = [[chance.randrange(VOCAB) for _ in range(length)] for length in LENGTHS]
    tables = block_tables()
    params = SamplingParams(temperature=0.0, logprobs=VOCAB)
    rows: list[list[float]] = []
    for part in range(3):
        chunks = []
        for number, prompt in enumerate(prompts):
            bounds = [0, len(prompt) // 2, len(prompt) - 1, len(prompt)]
            lo, hi = bounds[part], bounds[part + 1]
            if lo < hi:
                spec = SampleSpec(params, prompt[:hi], [], frozenset())
                chunks.append(Chunk(number, prompt[lo:hi], lo, tables[number], lo, spec))
        if part == 2:
            before_last()
        for sampled in runner.execute(Batch(chunks)).sampled:
            assert sampled is not None
            found = dict(sampled.top)
            rows.append([found[token] for token in range(VOCAB)])
    return np.array(rows)


def excess(found: Floats, expected: Floats) -> float:
    """The worst position's distance as a part of what is allowed: within the bounds if at most 1."""
    mean = np.abs(found - expected).mean(axis=1)
    divergence = (np.exp(expected) * (expected - found)).sum(axis=1)
    return float(max(mean.max() / MAX_MEAN_DIFFERENCE, divergence.max() / MAX_DIVERGENCE))
