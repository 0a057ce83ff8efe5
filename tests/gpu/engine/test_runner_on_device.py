"""The runner on the KV of a ``cuda_ipc`` heap gives the tokens of the runner on a CPU."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from microserve.kvcache.heap.factory import make_heap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.settings.settings import Settings
from microserve.protocol.settings.sources import load_settings
from microserve.services.engine.core.batch import Batch, Chunk, SampleSpec
from microserve.services.engine.model.device.decode_graphs import CudaCapture
from microserve.services.engine.model.model import LoadedModel, load_model
from microserve.services.engine.model.runner import ModelRunner
from tests.support.engine.model.tiny_model import make_tiny_model

NUM_BLOCKS, BLOCK = 64, 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=64)


@pytest.fixture(scope="module")
def settings() -> Settings:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is False")
    overrides = ["engine.device=cuda:0", "kvcache.heap=cuda_ipc", "kvcache.grant_slots=4"]
    return load_settings(overrides=[*overrides, f"kvcache.num_blocks={NUM_BLOCKS}"])


class Replays(CudaCapture):
    """Counts them: launch by launch the tokens would be the same."""

    count = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        replay, output = super().__call__(run)

        def counted() -> None:
            self.count += 1
            replay()

        return counted, output


def serve(
    runner: ModelRunner, prompts: list[list[int]], rng: random.Random, *, is_layerwise: bool = True
) -> list[list[int]]:
    """Chunked prefills beside decodes, four tokens each."""
    tokens, computed = [list(prompt) for prompt in prompts], [0] * len(prompts)
    tables = [list(range(8 * number, 8 * number + 8)) for number in range(len(prompts))]
    while any(len(have) < len(prompt) + 4 for have, prompt in zip(tokens, prompts, strict=True)):
        chunks, owners = [], []
        for number, (have, prompt) in enumerate(zip(tokens, prompts, strict=True)):
            waiting = len(have) - computed[number]
            if len(have) < len(prompt) + 4:
                length = rng.randint(1, waiting)
                begin = computed[number]
                spec = SampleSpec(GREEDY, prompt, have[len(prompt) :], frozenset())
                sample = spec if length == waiting else None
                part = have[begin : begin + length]
                chunks.append(Chunk(number, part, begin, tables[number], begin, sample))
                owners.append(number)
                computed[number] += length
        for number, sampled in zip(owners, runner.execute(Batch(chunks, is_layerwise)).sampled, strict=True):
            if sampled is not None:
                tokens[number].append(sampled.token_id)
    return [have[len(prompt) :] for have, prompt in zip(tokens, prompts, strict=True)]


def layout_of(model: LoadedModel) -> KvLayout:
    spec = model.spec
    return KvLayout(
        model=spec.name,
        num_layers=spec.num_layers,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
    )


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_runner_gives_the_tokens_of_a_cpu(tmp_path: Path, settings: Settings, family: str) -> None:
    directory = make_tiny_model(tmp_path / family, family, head_dim=64)
    rng = random.Random(1)
    prompts = [[rng.randrange(320) for _ in range(length)] for length in (1, 16, 33, 90)]
    here = load_model(directory, dtype="float32")
    region = np.zeros(layout_of(here).data_nbytes, np.uint8)
    expected = serve(ModelRunner(here, region, NUM_BLOCKS, BLOCK), prompts, random.Random(2))

    there = load_model(directory, dtype="float32", device=settings.engine.device)
    heap, data = make_heap(settings, layout_of(there), 7)
    with heap:
        runner = ModelRunner(there, data, NUM_BLOCKS, BLOCK)
        assert runner._stream is not None
        assert serve(runner, prompts, random.Random(2)) == expected

        replays = Replays(runner._stream)
        runner.capture_decodes(len(prompts), 128, replays)
        assert serve(runner, prompts, random.Random(2), is_layerwise=False) == expected
        assert replays.count > 0
        # And again: what a replay leaves behind must not show in the next.
        assert serve(runner, prompts[::-1], random.Random(3), is_layerwise=False) == expected[::-1]
