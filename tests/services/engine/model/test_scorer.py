"""Log-probabilities of a prompt's own tokens: of the raw logits, with the bits that a sampled token has."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.protocol.messages.request.prompt_logprobs import PromptLogprob, PromptLogprobs
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Batch, Chunk, Runner, Sampled, SampleSpec, Scored, ScoreSpec
from microserve.services.engine.model import sampler
from microserve.services.engine.model.device.device_sampler import sample_there
from microserve.services.engine.model.device.device_scorer import score_there
from microserve.services.engine.model.model import load_model
from microserve.services.engine.model.runner import ModelRunner
from microserve.services.engine.model.sampler import sample
from microserve.services.engine.model.scorer import score
from microserve.services.engine.native.packing import native_runner
from tests.support.engine.model.exact_rows import Rerun
from tests.support.engine.model.tiny_model import make_tiny_model
from tests.support.engine.native_mesh import tiny

VOCAB = 40
NUM_BLOCKS, BLOCK_SIZE = 24, 4
BOTH = pytest.mark.parametrize(("score_by", "sample_by"), [(score, sample), (score_there, sample_there)])


def rows_of(scored: Scored) -> list[PromptLogprob]:
    return list(PromptLogprobs(1, scored.num_top, scored.rows))


@BOTH
@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    counts=st.lists(st.tuples(st.integers(1, 20), st.sampled_from([0, 1, 3, 60])), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_row_has_the_bits_of_a_sampled_token_there(
    score_by: Any, sample_by: Any, seed: int, counts: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    """Logits of few bits, where many are equal; rows that are not wanted stand between."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(count for count, _ in counts)
    logits = (3 * torch.randn(2 * total, VOCAB, generator=generator)).to(dtype)
    places = np.arange(0, 2 * total, 2)
    targets = torch.randint(VOCAB, (total,), generator=generator).tolist()
    specs, start = [], 0
    for count, num_top in counts:
        specs.append(ScoreSpec(0, targets[start : start + count], num_top))
        start += count
    found = [row for scored in score_by(logits, places, specs) for row in rows_of(scored)]

    num_tops = [min(num_top, VOCAB) for count, num_top in counts for _ in range(count)]
    bias = [{target: 100.0} for target in targets]  # so that it is the one that is drawn
    wanted = [
        SampleSpec(SamplingParams(temperature=0.0, logprobs=top, logit_bias=each), [], [], frozenset())
        for top, each in zip(num_tops, bias, strict=True)
    ]
    for row, sampled, target, place in zip(
        found, sample_by(logits[places], wanted), targets, places, strict=True
    ):
        assert sampled.token_id == target
        assert (row.logprob, list(row.top)) == (sampled.logprob, sampled.top)
        probabilities = torch.log_softmax(logits[place].float(), 0)
        assert row.logprob == pytest.approx(probabilities[target].item(), abs=1e-5)
        assert 1 <= row.rank <= 1 + int((logits[place] > logits[place][target]).sum())
        assert not row.top or (row.rank == 1) == (row.logprob == row.top[0][1])
        assert [logprob for _, logprob in row.top][row.rank - 1 : row.rank] in ([], [row.logprob])


@BOTH
def test_a_row_that_is_no_number_is_its_own_prompts_end(score_by: Any, sample_by: Any) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, 5] = float("nan")
    broken, whole = score_by(logits, np.array([0, 1, 2]), [ScoreSpec(0, [1, 2], 1), ScoreSpec(0, [3], 1)])

    assert broken.error is not None and broken.error.code == "internal"
    assert whole.error is None and len(rows_of(whole)) == 1


# --- whole models ----------------------------------------------------------------------------------


def scored_by(
    runner: Runner, prompt: list[int], num_top: int, rng: random.Random, company: list[int]
) -> bytes:
    """In chunks of any length, each beside a chunk of another prompt that is sampled from."""
    rows, start = b"", 0
    blocks = list(range(NUM_BLOCKS))
    rng.shuffle(blocks)
    spec = SampleSpec(SamplingParams(temperature=0.0), company, [], frozenset())
    while start < len(prompt):
        end = start + rng.randint(1, len(prompt) - start)
        targets = prompt[start + 1 : end + 1]
        score = ScoreSpec(0, targets, num_top) if targets else None
        sample_last = SampleSpec(SamplingParams(temperature=0.0, logprobs=1), prompt, [], frozenset())
        chunk = Chunk(0, prompt[start:end], start, blocks[:12], start, None, score)
        if end == len(prompt):
            chunk.sample = sample_last
        chunks = [chunk]
        if rng.random() < 0.5:
            chunks.insert(rng.randint(0, 1), Chunk(1, company, 0, blocks[12:], 0, spec))
        result = runner.execute(Batch(chunks, is_layerwise=False))
        place = chunks.index(chunk)
        if score is not None:
            assert result.scored.keys() == {place} and result.scored[place].error is None
            rows += result.scored[place].rows
        assert [sampled is not None for sampled in result.sampled] == [
            each.sample is not None for each in chunks
        ]
        start = end
    return rows


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    from transformers import AutoModelForCausalLM

    path = make_tiny_model(tmp_path_factory.mktemp("model"), "llama", 500)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), path


def runners(path: Path) -> dict[str, Runner]:
    """Every step that computes in fp32 on this machine."""

    def region(model: Any) -> np.ndarray[Any, Any]:
        spec = model.spec
        nbytes = spec.num_layers * NUM_BLOCKS * 2 * BLOCK_SIZE * spec.num_kv_heads * spec.head_dim * 4
        return np.full(nbytes, 0xFF, np.uint8)

    model = load_model(path, dtype="float32")
    native = native_runner(model, region(model), NUM_BLOCKS, BLOCK_SIZE, threads=2, max_rows=64)
    plain = ModelRunner(model, region(model), NUM_BLOCKS, BLOCK_SIZE)
    graphs = ModelRunner(model, region(model), NUM_BLOCKS, BLOCK_SIZE)
    graphs.capture_decodes(4, NUM_BLOCKS * BLOCK_SIZE, Rerun())
    graphs._score = score_there  # as on a device
    return {"native": native, "transformers": plain, "graphs": graphs}


def test_every_step_tells_what_transformers_tells(oracle: tuple[Any, Path]) -> None:
    model, path = oracle
    rng = random.Random(5)
    prompt = [rng.randrange(500) for _ in range(41)]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt])).logits[0].float()
    wanted = torch.log_softmax(logits, -1)
    for name, runner in runners(path).items():
        for _ in range(4):
            found = rows_of(Scored(scored_by(runner, prompt, 3, rng, [7, 8, 9]), 3))
            assert len(found) == len(prompt) - 1, name
            for position, row in enumerate(found):
                own, target = wanted[position], prompt[position + 1]
                assert row.logprob == pytest.approx(own[target].item(), abs=1e-4), name
                np.testing.assert_allclose([p for _, p in row.top], own.topk(3).values.numpy(), atol=1e-4)
                assert all(own[t].item() == pytest.approx(p, abs=1e-4) for t, p in row.top), name
                assert row.rank == pytest.approx(1 + (own > own[target] + 1e-4).sum().item(), abs=3), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_row_of_the_native_step_has_the_same_bits_however_its_prompt_is_cut(dtype: str) -> None:
    model = tiny("llama", dtype)
    spec = model.spec
    nbytes = spec.num_layers * NUM_BLOCKS * 2 * BLOCK_SIZE * spec.num_kv_heads * spec.head_dim * 4
    rng = random.Random(6)
    prompt = [rng.randrange(500) for _ in range(41)]
    seen = set()
    for threads in (1, 2):
        data = np.full(nbytes, 0xFF, np.uint8)
        runner = native_runner(model, data, NUM_BLOCKS, BLOCK_SIZE, threads=threads, max_rows=64)
        assert runner.numerics.is_exact
        seen |= {scored_by(runner, prompt, 5, rng, [7, 8, 9]) for _ in range(10)}

    assert len(seen) == 1


def test_the_native_step_tells_of_a_token_the_same_whether_it_is_sampled_or_in_a_prompt() -> None:
    model = tiny("llama", "bfloat16")
    spec = model.spec
    nbytes = spec.num_layers * NUM_BLOCKS * 2 * BLOCK_SIZE * spec.num_kv_heads * spec.head_dim * 4
    runner = native_runner(model, np.zeros(nbytes, np.uint8), NUM_BLOCKS, BLOCK_SIZE, threads=1, max_rows=64)
    rng = random.Random(7)
    tokens = [rng.randrange(500) for _ in range(9)]
    said: list[Sampled] = []
    params = SamplingParams(temperature=0.0, logprobs=2)
    while len(tokens) < 40:
        start = 0 if not said else len(tokens) - 1
        wanted = SampleSpec(params, tokens, [], frozenset())
        chunk = Chunk(0, tokens[start:], start, list(range(12)), start, wanted)
        [sampled] = runner.execute(Batch([chunk])).sampled
        assert sampled is not None
        said.append(sampled)
        tokens.append(sampled.token_id)
    rows = rows_of(Scored(scored_by(runner, tokens, 2, rng, [7]), 2))[8:]

    assert [(row.logprob, list(row.top), row.rank) for row in rows] == [(s.logprob, s.top, 1) for s in said]


@given(
    values=st.lists(st.sampled_from([0.0, -1.0, -1.5, -2.0, float("-inf")]), min_size=1, max_size=120),
    count=st.integers(1, 8),
)
def test_the_likeliest_of_a_large_vocabulary_are_found_by_blocks(values: list[float], count: int) -> None:
    """With blocks of 4 tokens instead of 256; many are equal, of which the lower ids count."""
    count = min(count, len(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "BLOCK", 4)
        found = sampler.likeliest_of(np.array(values, dtype=np.float32), count)

    assert found.tolist() == sorted(range(len(values)), key=lambda at: (-values[at], at))[:count]
