"""One model twice, ours and transformers', and continuous batching at random over ours."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from microserve.kvcache.layout import KvLayout
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Batch, Chunk, SampleSpec
from microserve.services.engine.model.attention.step import MakeAttention
from microserve.services.engine.model.model import LoadedModel
from microserve.services.engine.model.runner import ModelRunner

NUM_BLOCKS, BLOCK_SIZE = 64, 4
GREEDY = SamplingParams(temperature=0.0, max_tokens=64)


@dataclass
class World:
    """One model twice: ours on a region of memory, and transformers' own as the oracle."""

    model: LoadedModel
    oracle: Any
    make_attention: MakeAttention | None = None
    region: npt.NDArray[np.uint8] = field(init=False)
    runner: ModelRunner = field(init=False)

    def __post_init__(self) -> None:
        self.clear()

    @property
    def layout(self) -> KvLayout:
        spec = self.model.spec
        return KvLayout(
            model=spec.name,
            num_layers=spec.num_layers,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=spec.dtype,
            state_nbytes=spec.state_nbytes,
        )

    def clear(self) -> None:
        """Unused memory holds NaN (all bits set), as if a sequence with broken numbers had been there."""
        self.region = np.full(self.layout.data_nbytes, 0xFF, np.uint8)
        self.runner = ModelRunner(
            self.model, self.region, NUM_BLOCKS, BLOCK_SIZE, make_attention=self.make_attention
        )

    def expected(self, prompt: list[int], num_tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        out = self.oracle.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens

    def row(self, layer: int, block: int, kv: int, row: int) -> npt.NDArray[np.float32]:
        """One token's K or V in the region, where the engine's layout says that it is."""
        begin = self.layout.offset(layer, block, kv, row)
        return self.region[begin : begin + self.layout.row_nbytes].view(np.float32)


def spec_of(tokens: list[int], num_prompt: int, params: SamplingParams = GREEDY) -> SampleSpec:
    return SampleSpec(params, tokens[:num_prompt], tokens[num_prompt:], frozenset())


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(320) for _ in range(length)]


@dataclass
class Sequence:
    tokens: list[int]
    num_prompt: int
    num_output: int
    blocks: list[int]
    state: list[int]
    """Blocks of its state, where the model is hybrid."""
    computed: int = 0

    @property
    def done(self) -> bool:
        return len(self.tokens) == self.num_prompt + self.num_output


def serve(world: World, prompts: list[list[int]], num_output: int, rng: random.Random) -> list[list[int]]:
    """Continuous batching at random: who runs, how long a chunk is, which blocks, in which order."""
    free = list(range(NUM_BLOCKS))
    rng.shuffle(free)
    sequences = []
    for prompt in prompts:
        needed = -(-(len(prompt) + num_output) // BLOCK_SIZE)
        blocks, state = (
            [free.pop() for _ in range(count)] for count in (needed, world.layout.num_state_blocks)
        )
        sequences.append(Sequence(list(prompt), len(prompt), num_output, blocks, state))
    while any(not sequence.done for sequence in sequences):
        unfinished = [sequence for sequence in sequences if not sequence.done]
        running = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        chunks = []
        for sequence in running:
            waiting = len(sequence.tokens) - sequence.computed
            length = rng.randint(1, waiting)
            begin, sequence.computed = sequence.computed, sequence.computed + length
            sample = spec_of(sequence.tokens, sequence.num_prompt) if length == waiting else None
            tokens = sequence.tokens[begin : begin + length]
            states = (sequence.state if begin else None, sequence.state) if sequence.state else (None, None)
            chunks.append(Chunk(id(sequence), tokens, begin, sequence.blocks, begin, sample, None, *states))
        result = world.runner.execute(Batch(chunks))
        for sequence, chunk, sampled in zip(running, chunks, result.sampled, strict=True):
            assert (sampled is None) == (chunk.sample is None)
            if sampled is not None:
                sequence.tokens.append(sampled.token_id)
    return [sequence.tokens[sequence.num_prompt :] for sequence in sequences]
