"""Replayed decode steps give the tokens of steps that are run launch by launch."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from microserve.kernels.attention.paged_attention import Span
from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Batch, Chunk, SampleSpec
from microserve.services.engine.model.attention.step import DeviceAttention, device_attention
from microserve.services.engine.model.device.decode_graphs import MAX_BUCKET, bucket_sizes
from microserve.services.engine.model.model import LoadedModel, load_model
from microserve.services.engine.model.runner import ModelRunner
from tests.support.engine.device.recorded_graph import Freed, HostRead, device_operations, record
from tests.support.engine.model.tiny_model import FAMILIES, make_tiny_model

NUM_BLOCKS, BLOCK_SIZE, MAX_NUM_SEQS = 48, 4, 5
GREEDY = SamplingParams(temperature=0.0, max_tokens=64, logprobs=5)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(
        make_tiny_model(tmp_path_factory.mktemp("model") / request.param, request.param), dtype="float32"
    )


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with device_operations(monkeypatch):
        yield


class Replays:
    """Records passes, and counts how often each bucket is replayed."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        replay, output = record(run)

        def counted() -> None:
            self.sizes.append(output.shape[0])
            replay()

        return counted, output


def make_runner(model: LoadedModel, capture: Replays | None = None) -> ModelRunner:
    spec = model.spec
    layout = KvLayout(
        "m", spec.num_layers, NUM_BLOCKS, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim, spec.dtype
    )
    # NaN wherever nothing was written.
    runner = ModelRunner(model, np.full(layout.data_nbytes, 0xFF, np.uint8), NUM_BLOCKS, BLOCK_SIZE)
    if capture is not None:
        runner.capture_decodes(MAX_NUM_SEQS, 40, capture)
    return runner


def serve(runner: ModelRunner, seed: int) -> tuple[list[list[int]], list[float]]:
    """Eight sequences come and go; prompts of any length in one chunk, then any of them decode together.

    Gives their tokens, and the log-probabilities of the likeliest of all steps."""
    rng = random.Random(seed)
    blocks = list(range(NUM_BLOCKS))
    rng.shuffle(blocks)
    prompts = [[rng.randrange(320) for _ in range(rng.choice([1, 3, 4, 17]))] for _ in range(8)]
    tokens = [list(prompt) for prompt in prompts]
    tables = [blocks[6 * number : 6 * number + 6] for number in range(8)]
    found: list[float] = []

    def step(chosen: list[int], *, is_layerwise: bool) -> None:
        chunks = []
        for number in chosen:
            have, num_prompt = tokens[number], len(prompts[number])
            start = len(have) - 1 if len(have) > num_prompt else 0
            spec = SampleSpec(GREEDY, have[:num_prompt], have[num_prompt:], frozenset())
            chunks.append(Chunk(number, have[start:], start, tables[number], start, spec))
        layers: list[int] = []
        result = runner.execute(Batch(chunks, is_layerwise), layers.append)
        assert layers == list(range(runner.spec.num_layers))
        for number, sampled in zip(chosen, result.sampled, strict=True):
            assert sampled is not None
            tokens[number].append(sampled.token_id)
            found.extend(value for _, value in sampled.top)

    def unfinished(numbers: int) -> list[int]:
        return [one for one in range(numbers) if len(tokens[one]) < len(prompts[one]) + 6]

    for number in range(8):
        step([number], is_layerwise=True)
        left = unfinished(number + 1)
        step(rng.sample(left, rng.randint(1, min(len(left), 2))), is_layerwise=rng.random() < 0.2)
    for size in itertools.cycle(range(MAX_NUM_SEQS, 0, -1)):
        if not (left := unfinished(8)):
            break
        step(rng.sample(left, min(len(left), size)), is_layerwise=False)
    return tokens, found


@pytest.mark.parametrize("seed", range(3))
def test_replays_give_the_numbers_of_the_steps_they_stand_for(model: LoadedModel, seed: int) -> None:
    replays = Replays()
    expected, expected_logprobs = serve(make_runner(model), seed)

    tokens, logprobs = serve(make_runner(model, replays), seed)

    assert tokens == expected
    assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)
    assert set(replays.sizes) == set(bucket_sizes(MAX_NUM_SEQS))


def test_layers_are_not_replayed_where_they_are_sent_nor_prompts_nor_too_many(model: LoadedModel) -> None:
    replays = Replays()
    runner = make_runner(model, replays)

    def chunk(number: int, num_tokens: int, start: int = 0) -> Chunk:
        return Chunk(number, [1] * num_tokens, start, [number, number + 1], start, None)

    runner.execute(Batch([chunk(0, 1)], is_layerwise=True))
    runner.execute(Batch([chunk(0, 1), chunk(2, 2)], is_layerwise=False))
    runner.execute(Batch([chunk(2 * number, 1) for number in range(MAX_NUM_SEQS + 1)], is_layerwise=False))
    long = Chunk(0, [1], 40, list(range(11)), 40, None)
    runner.execute(Batch([long], is_layerwise=False))
    assert replays.sizes == []

    runner.execute(Batch([chunk(2 * number, 1) for number in range(3)], is_layerwise=False))
    assert replays.sizes == [4]


def test_rows_that_nobody_samples_and_shared_blocks_are_as_in_any_step(model: LoadedModel) -> None:
    """A chunk that wants no token, and one whose KV stands in a shared block and may not be written."""
    prompt = [5, 6, 7, 8, 9]
    results = []
    for capture in (None, Replays()):
        runner = make_runner(model, capture)
        runner.execute(Batch([Chunk(0, prompt[:4], 0, [3], 0, None), Chunk(1, prompt, 0, [7, 2], 0, None)]))
        spec = SampleSpec(GREEDY, prompt, [], frozenset())
        chunks = [Chunk(1, [11], 5, [7, 2], 5, None), Chunk(0, [9], 4, [3, 2], 5, spec)]
        results.append(runner.execute(Batch(chunks, is_layerwise=False)).sampled[1])
        if capture is not None:
            assert capture.sizes == [2]
    first, second = results
    assert first is not None
    assert second is not None
    assert first.token_id == second.token_id
    assert [value for _, value in first.top] == pytest.approx([value for _, value in second.top], abs=1e-4)


def test_the_stand_in_notices_what_a_graph_cannot_do() -> None:
    static = torch.tensor([1.0, 2.0])
    with pytest.raises(HostRead):
        record(lambda: static * static[0].item())

    for shape_on_host in (
        lambda: static[static > 1.0],
        lambda: static.repeat_interleave(static.long()),
        static.unique,
    ):
        with pytest.raises(HostRead):
            record(shape_on_host)
    record(lambda: static[torch.tensor([1, 0])])

    host = [3.0]
    replay, output = record(lambda: static * 2 + torch.tensor(host))
    static[0], host[0] = 10.0, 100.0
    replay()
    assert output.tolist() == [23.0, 7.0]

    lent = [torch.ones(2)]
    replay, _ = record(lambda: lent[0] * torch.arange(2.0))
    replay()
    lent.clear()
    with pytest.raises(Freed):
        replay()


@given(st.integers(1, 2000))
def test_every_batch_has_a_bucket_that_wastes_little(max_num_seqs: int) -> None:
    sizes = bucket_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == min(max_num_seqs, MAX_BUCKET)
    for before, size in zip([0, *sizes], sizes, strict=False):
        waste = size - before - 1
        assert waste < max(4, 8 if size <= 64 else size // 4)


def test_no_forward_pass_waits_for_its_device(model: LoadedModel) -> None:
    runner = make_runner(model)
    spans = [Span(1, 6, [3, 4]), Span(7, 7, [5, 6])]
    slots = np.array([17, *range(20, 27)])
    attention = device_attention(spans, slots, runner._layers[0])
    tokens, positions = torch.arange(8), torch.tensor([5, *range(7)])
    with torch.inference_mode():
        _, logits = record(lambda: runner._forward(attention, tokens, positions, rows=torch.tensor([0, 7])))
    assert logits.shape == (2, model.spec.vocab_size)


def test_graphs_on_a_cpu_are_refused_by_name(model: LoadedModel) -> None:
    with pytest.raises(ConfigError) as refused:
        make_runner(model).capture_decodes(4, 40)
    assert refused.value.field == "engine.cuda_graphs"


def test_a_capture_that_fails_is_a_wrong_setting_by_name_in_one_line(model: LoadedModel) -> None:
    """Twenty graphs may take memory that the weights and the pool have left, or a library may refuse."""

    class Full(Replays):
        def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
            if self.sizes:
                try:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
                finally:  # as torch.cuda.graph does when it is left
                    raise RuntimeError("operation failed due to a previous error during capture")
            self.sizes.append(0)
            return super().__call__(run)

    with pytest.raises(ConfigError, match=r"engine.cuda_graphs.*out of memory") as refused:
        make_runner(model, Full())
    assert refused.value.field == "engine.cuda_graphs"
    assert "\n" not in refused.value.detail


def test_a_pass_that_reads_its_lengths_on_the_host_is_noticed(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: attention that takes its lengths from the host at capture."""

    class Baked(DeviceAttention):
        def attend(self, query: Tensor, kv: Tensor, *, scale: float, sliding_window: int | None) -> Tensor:
            self._batch.context_lens.tolist()
            return super().attend(query, kv, scale=scale, sliding_window=sliding_window)

    monkeypatch.setattr("microserve.services.engine.model.runner.DeviceAttention", Baked)
    with pytest.raises(HostRead):
        make_runner(model, Replays())
