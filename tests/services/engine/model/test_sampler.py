"""Each decoding parameter against a naive implementation; determinism; the numbers that must never change.

All of it by both samplers: row by row, and as on a device, for all rows at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from microserve.kernels import philox
from microserve.kernels.philox import uniforms
from microserve.protocol.errors import InternalError, InvalidRequest
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Sampled, SampleSpec
from microserve.services.engine.guidance.guide import bits_of
from microserve.services.engine.model import sampler
from microserve.services.engine.model.device.device_sampler import sample_there

Sample = Callable[[Tensor, Sequence[SampleSpec]], list[Sampled]]
sample: Sample
VOCAB = 40
EOS = frozenset({2, 5})
Row = npt.NDArray[np.float32]


@pytest.fixture(scope="module", autouse=True, params=[sampler.sample, sample_there], ids=["host", "device"])
def chosen_sampler(request: pytest.FixtureRequest) -> None:
    global sample  # noqa: PLW0603
    sample = request.param


def spec_of(
    params: SamplingParams, prompt: list[int] | None = None, output: list[int] | None = None
) -> SampleSpec:
    return SampleSpec(params, prompt or [1, 2, 3], output or [], EOS)


def draw_all(row: Any, specs: list[SampleSpec]) -> list[int]:
    """Tokens of as many draws from one row."""
    logits = torch.tensor(np.asarray(row, dtype=np.float32)).expand(len(specs), -1)
    return [sampled.token_id for sampled in sample(logits, specs)]


def draw(row: Any, spec: SampleSpec) -> Sampled:
    (sampled,) = sample(torch.tensor(np.asarray(row, dtype=np.float32)).unsqueeze(0), [spec])
    return sampled


# --- a naive implementation: one token at a time, everything sorted -----------------------------------


def naive_scores(row: Row, spec: SampleSpec) -> list[float]:
    params = spec.params
    scores = [float(score) for score in row]
    for token in range(len(scores)):
        scores[token] += params.logit_bias.get(token, 0.0)
        if token in spec.prompt_token_ids or token in spec.output_token_ids:
            if scores[token] > 0:
                scores[token] /= params.repetition_penalty
            else:
                scores[token] *= params.repetition_penalty
        count = spec.output_token_ids.count(token)
        if count:
            scores[token] -= params.presence_penalty + params.frequency_penalty * count
        if spec.allowed is not None:
            if not spec.allowed[token // 32] >> token % 32 & 1:
                scores[token] = -np.inf
            continue  # who made the mask knows of ends
        too_early = len(spec.output_token_ids) < params.min_tokens
        if too_early and (token in spec.eos_token_ids or token in params.stop_token_ids):
            scores[token] = -np.inf
    return scores


def naive_distribution(scores: list[float], params: SamplingParams) -> list[float]:
    """Probabilities in vocabulary order after temperature and filters."""
    largest = max(scores)
    weights = [float(np.exp((score - largest) / params.temperature)) for score in scores]
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if params.top_k:
        order = order[: params.top_k]
    if params.top_p < 1.0:
        total, reached, nucleus = sum(weights[token] for token in order), 0.0, []
        for token in order:
            nucleus.append(token)
            reached += weights[token]
            if reached >= params.top_p * total:
                break
        order = nucleus
    if params.min_p:
        order = [token for token in order if weights[token] >= params.min_p * weights[order[0]]]
    total = sum(weights[token] for token in order)
    return [weights[token] / total if token in order else 0.0 for token in range(len(scores))]


def naive_token(row: Row, spec: SampleSpec) -> int:
    scores = naive_scores(row, spec)
    if spec.params.temperature == 0.0:
        return max(range(len(scores)), key=lambda token: (scores[token], -token))
    position = len(spec.prompt_token_ids) + len(spec.output_token_ids)
    numbers = uniforms(spec.params.seed, position, len(scores))
    # log(p) and the scaled score differ by a constant, so the best of both is the same.
    best, chosen_token = -math.inf, -1
    for token, probability in enumerate(naive_distribution(scores, spec.params)):
        if probability > 0.0:
            noisy = math.log(probability) - math.log(-math.log(numbers[token]))
            if noisy > best:
                best, chosen_token = noisy, token
    return chosen_token


rows = st.integers(0, 2**32).map(
    lambda seed: np.random.default_rng(seed).normal(0.0, 3.0, VOCAB).astype(np.float32)
)
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=12)


@st.composite
def specs(draw_one: st.DrawFn) -> SampleSpec:
    max_tokens = 20
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw_one(st.sampled_from([0, 0, 3, 12])),
        temperature=draw_one(st.sampled_from([0.0, 0.01, 0.7, 1.0, 2.5])),
        top_p=draw_one(st.just(1.0) | st.floats(0.01, 0.99)),
        top_k=draw_one(st.sampled_from([0, 0, 1, 5, 39, 40, 1000])),
        min_p=draw_one(st.just(0.0) | st.floats(0.0, 1.0)),
        repetition_penalty=draw_one(st.just(1.0) | st.floats(0.5, 2.0)),
        presence_penalty=draw_one(st.just(0.0) | st.floats(-2.0, 2.0)),
        frequency_penalty=draw_one(st.just(0.0) | st.floats(-2.0, 2.0)),
        logit_bias=draw_one(st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=4)),
        seed=draw_one(st.integers(0, 2**63 - 1)),
        stop_token_ids=tuple(draw_one(st.lists(st.integers(0, VOCAB - 1), max_size=3))),
        logprobs=draw_one(st.none() | st.integers(0, 20)),
    )
    params.validate(VOCAB)
    some = st.sets(st.integers(0, VOCAB - 1), min_size=1)
    allowed = draw_one(st.none() | some.map(lambda ids: bits_of(ids, VOCAB)))
    return SampleSpec(params, draw_one(tokens), draw_one(tokens), EOS, allowed=allowed)


@settings(deadline=None, max_examples=500)
@given(row=rows, spec=specs())
def test_equals_the_naive_implementation(row: Row, spec: SampleSpec) -> None:
    assert draw(row, spec).token_id == naive_token(row, spec)


@settings(deadline=None)
@given(batch=st.lists(st.tuples(rows, specs()), min_size=1, max_size=6), order=st.randoms())
def test_a_row_does_not_depend_on_its_neighbours(batch: list[tuple[Row, SampleSpec]], order: Any) -> None:
    alone = [draw(row, spec) for row, spec in batch]
    indices = list(range(len(batch)))
    order.shuffle(indices)
    logits = torch.from_numpy(np.stack([batch[index][0] for index in indices]))
    together = sample(logits, [batch[index][1] for index in indices])
    for one, index in zip(together, indices, strict=True):
        assert (one.token_id, [token for token, _ in one.top]) == (
            alone[index].token_id,
            [token for token, _ in alone[index].top],
        )
        # Sums over several rows at once may round otherwise.
        assert one.logprob == pytest.approx(alone[index].logprob, abs=1e-6)


@settings(deadline=None)
@given(row=rows, spec=specs())
def test_logprobs_are_of_the_raw_logits(row: Row, spec: SampleSpec) -> None:
    sampled, asked = draw(row, spec), spec.params.logprobs
    if asked is None:
        assert (sampled.logprob, sampled.top) == (None, [])
        return
    exact = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    assert sampled.logprob == pytest.approx(exact[sampled.token_id], abs=1e-5)
    assert [token for token, _ in sampled.top] == np.argsort(-row, kind="stable")[:asked].tolist()
    assert [logprob for _, logprob in sampled.top] == pytest.approx(np.sort(exact)[::-1][:asked], abs=1e-5)


# --- greedy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("logprobs", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_lowest_of_equal_tokens(logprobs: int | None, dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 1000, dtype=dtype)
    logits[0, [7, 512, 999]] = 3.5
    greedy = spec_of(SamplingParams(temperature=0.0, logprobs=logprobs))
    assert [sampled.token_id for sampled in sample(logits, [greedy, greedy])] == [7, 0]
    assert [token for token, _ in sample(logits, [greedy, greedy])[0].top] == [7, 512, 999][: logprobs or 0]


def test_more_logprobs_than_tokens_are_all_of_them() -> None:
    sampled = draw([0.0, 2.0, 1.0], spec_of(SamplingParams(temperature=0.0, logprobs=20)))
    assert [token for token, _ in sampled.top] == [1, 2, 0]


def test_greedy_and_sampled_rows_mix() -> None:
    row = np.arange(VOCAB, dtype=np.float32)
    greedy = spec_of(SamplingParams(temperature=0.0))
    sampled = spec_of(SamplingParams(temperature=1.0, top_k=1))
    forced = spec_of(SamplingParams(temperature=0.0, logit_bias={4: 100.0}))
    logits = torch.from_numpy(np.stack([row, -row, row, row]))
    assert [s.token_id for s in sample(logits, [greedy, greedy, sampled, forced])] == [39, 0, 39, 4]


def test_no_rows() -> None:
    assert sample(torch.empty(0, VOCAB), []) == []


# --- edges of the parameters ------------------------------------------------------------------------


def chosen(row: Any, params: dict[str, Any], count: int = 400) -> set[int]:
    """All tokens that come out under that many seeds."""
    return set(draw_all(row, [spec_of(SamplingParams(seed=seed, **params)) for seed in range(count)]))


def test_top_k_keeps_exactly_k_and_the_lowest_of_equals() -> None:
    assert chosen(np.zeros(10), {"top_k": 3}) == {0, 1, 2}
    assert chosen([0, 0, 5, 0, 0], {"top_k": 3, "temperature": 9.0}) == {0, 1, 2}


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-9}])
def test_scores_so_close_that_their_weights_are_equal_are_no_equals(filters: dict[str, Any]) -> None:
    assert chosen([0.0, 1e-20, -5.0], filters) == {1}


def test_top_p_keeps_the_token_that_reaches_it_and_no_more() -> None:
    assert chosen(np.zeros(4), {"top_p": 0.5}) == {0, 1}
    assert chosen(np.zeros(4), {"top_p": 0.51}) == {0, 1, 2}
    assert chosen([0.0, 9.0, 0.0], {"top_p": 1e-9}) == {1}


def test_top_p_counts_what_top_k_left() -> None:
    assert chosen(np.zeros(8), {"top_k": 4, "top_p": 0.5}) == {0, 1}


def test_min_p_is_relative_to_the_likeliest() -> None:
    row = np.log([0.5, 0.24, 0.26])
    assert chosen(row, {"min_p": 0.5}) == {0, 2}
    assert chosen(row, {"min_p": 1.0}) == {0}


def test_filters_on_a_large_vocabulary() -> None:
    row = np.random.default_rng(0).normal(0.0, 2.0, 5000).astype(np.float32)
    for seed in range(20):
        for params in ({"top_p": 0.9}, {"top_k": 100}, {"top_k": 3000, "top_p": 0.5}):
            spec = spec_of(SamplingParams(seed=seed, **params))
            assert draw(row, spec).token_id == naive_token(row, spec)


@pytest.mark.parametrize("temperature", [5e-324, 1e-12, 100.0])
def test_extreme_temperatures(temperature: float) -> None:
    row = [1.0, 5.0, 4.999, -3.0]
    out = chosen(row, {"temperature": temperature})
    assert out == ({1} if temperature < 1.0 else {0, 1, 2, 3})


@pytest.mark.parametrize("penalty", [5e-324, 100.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_extreme_repetition_penalty_stays_inside_the_numbers(penalty: float, temperature: float) -> None:
    params = SamplingParams(repetition_penalty=penalty, temperature=temperature)
    token = draw([30.0, 20.0, -1.0, 25.0], spec_of(params, prompt=[0, 2])).token_id
    assert token == 0 if penalty < 1.0 else token in (1, 3)


def test_min_tokens_forbids_eos_and_stop_ids_even_with_ignore_eos() -> None:
    row = np.zeros(8)
    for ignore_eos in (False, True):
        params = {"min_tokens": 1, "stop_token_ids": (0, 1), "ignore_eos": ignore_eos}
        assert chosen(row, params) == {3, 4, 6, 7}
    spec = spec_of(SamplingParams(min_tokens=1, temperature=0.0, stop_token_ids=(0,)), output=[9])
    assert draw(row, spec).token_id == 0, "one output token is enough"


def test_min_tokens_that_forbids_everything_is_refused() -> None:
    spec = spec_of(SamplingParams(min_tokens=1, stop_token_ids=(0, 1, 3, 4)))
    refused = draw(np.zeros(6), spec).error
    assert isinstance(refused, InvalidRequest)
    assert refused.field == "min_tokens"


def test_an_eos_id_past_the_vocabulary_is_harmless() -> None:
    spec = SampleSpec(SamplingParams(min_tokens=1, temperature=0.0), [1], [], frozenset({999}))
    assert draw([0.0, 1.0], spec).token_id == 1


def test_a_forbidden_token_is_never_drawn() -> None:
    row = np.full(6, -np.inf)
    row[[1, 4]] = 0.0
    assert chosen(row, {}) == {1, 4}


@pytest.mark.parametrize("lucky", [0, 1, 4, 5])
def test_no_luck_helps_a_forbidden_token(lucky: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise as large as it gets for one token: it wins if it may be chosen, and only then."""

    def numbers(seed: int, position: int, count: int) -> npt.NDArray[np.float64]:
        drawn = np.full(count, 0.5)
        drawn[lucky] = 1.0 - 2.0**-53
        return drawn

    for module in (sampler, philox):
        monkeypatch.setattr(module, "uniforms", numbers)
    row = np.full(6, -np.inf)
    row[[1, 4]] = 0.0
    assert draw(row, spec_of(SamplingParams())).token_id == (lucky if lucky in (1, 4) else 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_give_no_token(bad: float, temperature: float) -> None:
    logits = torch.zeros(4, VOCAB)
    logits[1, 17] = bad
    logits[2] = -torch.inf
    first, *broken, last = sample(logits, [spec_of(SamplingParams(temperature=temperature, logprobs=1))] * 4)
    assert first == last
    assert first.error is None
    for one in broken:
        assert (one.token_id, one.logprob, one.top) == (-1, None, [])
        assert isinstance(one.error, InternalError)


# --- randomness -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 2.0},
        {"temperature": 0.5, "top_k": 6},
        {"top_p": 0.8},
        {"min_p": 0.1, "top_p": 0.95, "top_k": 9},
    ],
)
@pytest.mark.parametrize("by", ["seed", "position"])
def test_frequencies_follow_the_distribution(params: dict[str, Any], by: str) -> None:
    """Chi-square against the naive distribution, over seeds at one position and positions of one seed."""
    row = np.random.default_rng(1).normal(0.0, 1.0, 12).astype(np.float32)
    count = 4000
    counts = np.zeros(12)
    places = [(index, 1) if by == "seed" else (7, index + 1) for index in range(count)]
    drawn = [spec_of(SamplingParams(seed=seed, **params), prompt=[0] * length) for seed, length in places]
    for token in draw_all(row, drawn):
        counts[token] += 1
    base = SamplingParams(**params)
    expected = np.array(naive_distribution([float(score) for score in row], base)) * count
    assert not counts[expected == 0].any()
    kept = expected > 0
    chi_square = float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    # 33 is above the 99.9 % point for up to 11 degrees of freedom (31.3); the seeds are fixed.
    assert chi_square < 33.0


def test_rounding_hardly_ever_changes_the_token() -> None:
    """Logits of thousands of likely tokens, off by rounding: next to no draw differs."""
    rng = np.random.default_rng(3)
    row = rng.normal(0.0, 1.0, 20_000).astype(np.float32)
    nudged = row + rng.normal(0.0, 1e-5, 20_000).astype(np.float32)
    chosen_specs = [spec_of(SamplingParams(seed=seed, top_p=0.99)) for seed in range(500)]
    pairs = zip(draw_all(row, chosen_specs), draw_all(nudged, chosen_specs), strict=True)
    assert sum(one != other for one, other in pairs) <= 1


def test_the_position_alone_moves_the_randomness_on() -> None:
    """A position reached by prompt or by output gives the same token: a moved request goes on alike."""
    row = np.zeros(VOCAB, dtype=np.float32)
    params = SamplingParams(seed=11)
    here = draw(row, spec_of(params, prompt=[1, 2, 3], output=[4, 5])).token_id
    there = draw(row, spec_of(params, prompt=[1, 2, 3, 4, 5], output=[])).token_id
    assert here == there
    later = {draw(row, spec_of(params, prompt=[1] * length)).token_id for length in range(1, 30)}
    assert len(later) > 10


def test_golden_tokens() -> None:
    row = ((np.arange(64) * 37) % 64).astype(np.float32) / 16
    drawn = [
        draw(row, spec_of(SamplingParams(seed=2026, **params), prompt=[0] * length)).token_id
        for params in ({}, {"temperature": 0.6}, {"top_k": 8}, {"top_p": 0.7}, {"min_p": 0.3})
        for length in (1, 10, 100, 1000)
    ]
    assert drawn == [50, 25, 57, 56, 50, 12, 57, 19, 50, 12, 57, 19, 50, 12, 57, 19, 50, 12, 57, 19]
