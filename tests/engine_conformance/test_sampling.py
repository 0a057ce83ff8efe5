"""Sampling parameters do what WIRE.md says, each by an effect that nothing else would have; split or not."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest

from microserve.protocol.messages.engine_info import GRAMMAR, PROMPT_LOGPROBS, EngineInfo
from microserve.protocol.messages.request.sampling import Grammar, SamplingParams
from tests.support.engine_conformance.answers import Answer, alone, generate, make_prompt, require_equal
from tests.support.engine_conformance.pair import Pair
from tests.support.engine_conformance.relay import fresh, relay
from tests.support.engine_conformance.wire_client import RefusedError, Stream, WireClient

LONG = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
WARM = SamplingParams(max_tokens=24, temperature=1.0, ignore_eos=True)


def changed(base: SamplingParams, **fields: Any) -> SamplingParams:
    return msgspec.structs.replace(base, **fields)


async def say(client: WireClient, tokens: list[int], sampling: SamplingParams) -> Stream:
    return await generate(client, fresh("says"), tokens, sampling)


def prompt_of(info: EngineInfo, name: str) -> list[int]:
    return make_prompt(info, info.block_size + 7, name)


async def test_greedy_is_the_likeliest_token_each_time(pair: Pair) -> None:
    async with pair.connect() as (_, b):
        stream = await say(b, prompt_of(b.info, "greedy"), changed(LONG, logprobs=3))
        for token, logprob in zip(stream.token_ids, stream.logprobs, strict=True):
            assert len(logprob.top) == 3 and logprob.top[0][0] == token
            assert logprob.top[0][1] == pytest.approx(logprob.logprob, abs=1e-5)
            assert [each for _, each in logprob.top] == sorted(
                (each for _, each in logprob.top), reverse=True
            )
            assert logprob.logprob <= 0.0


@pytest.mark.parametrize(
    "narrow",
    [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}],
    ids=lambda each: next(iter(each)),
)
async def test_what_leaves_one_token_is_greedy(pair: Pair, narrow: dict[str, float]) -> None:
    async with pair.connect() as (_, b):
        tokens = prompt_of(b.info, "narrow")
        greedy = await say(b, tokens, LONG)
        wide = await say(b, tokens, changed(WARM, temperature=2.0, seed=5))
        assert wide.token_ids != greedy.token_ids
        narrowed = changed(WARM, **{"temperature": 2.0, "seed": 5, **narrow})
        assert (await say(b, tokens, narrowed)).token_ids == greedy.token_ids


async def test_top_k_keeps_the_likeliest(pair: Pair) -> None:
    async with pair.connect() as (_, b):
        sampling = changed(WARM, temperature=2.0, top_k=4, logprobs=4, seed=3, max_tokens=40)
        stream = await say(b, prompt_of(b.info, "top_k"), sampling)
        likeliest = [[token for token, _ in each.top] for each in stream.logprobs]
        places = [top.index(token) for token, top in zip(stream.token_ids, likeliest, strict=True)]
        assert max(places) > 0, "of a distribution so flat not only the first is chosen"


async def test_a_seed_says_the_same_again_and_another_says_another_thing(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        tokens = prompt_of(b.info, "seed")
        first = await say(b, tokens, changed(WARM, seed=1))
        again = await say(b, tokens, changed(WARM, seed=1))
        other = await say(b, tokens, changed(WARM, seed=2))
        elsewhere = await say(a, tokens, changed(WARM, seed=1))
        assert first.token_ids == again.token_ids == elsewhere.token_ids != other.token_ids


async def test_a_bias_forces_and_forbids(pair: Pair) -> None:
    async with pair.connect() as (_, b):
        tokens = prompt_of(b.info, "bias")
        greedy = await say(b, tokens, LONG)
        favourite = greedy.token_ids[0]
        banned = await say(b, tokens, changed(LONG, logit_bias={favourite: -100.0}))
        assert favourite not in banned.token_ids
        forced = next(token for token in range(20, 250) if token not in greedy.token_ids)
        always = await say(b, tokens, changed(LONG, logit_bias={forced: 100.0}))
        assert set(always.token_ids) == {forced}


async def test_log_probabilities_are_of_the_raw_logits(pair: Pair) -> None:
    """A bias decides the choice and leaves what is said of it alone."""
    async with pair.connect() as (_, b):
        tokens, one = prompt_of(b.info, "raw"), changed(LONG, max_tokens=1, logprobs=20)
        plain = (await say(b, tokens, one)).logprobs[0]
        third, logprob = plain.top[2]
        biased = await say(b, tokens, changed(one, logit_bias={third: 100.0}))
        assert biased.token_ids == [third]
        assert biased.logprobs[0].logprob == pytest.approx(logprob, abs=1e-3)
        assert [token for token, _ in biased.logprobs[0].top[:3]] == [token for token, _ in plain.top[:3]]


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
async def test_penalties_count_what_was_said_before(pair: Pair, name: str) -> None:
    """A lead of one over another token is lost once the first has been said, with a penalty of two."""
    async with pair.connect() as (_, b):
        tokens = prompt_of(b.info, "penalty")
        first, bias = await lead_of_one(b, tokens)
        sampling = changed(LONG, max_tokens=2, logit_bias=bias)
        assert (await say(b, tokens, sampling)).token_ids == [first, first]
        penalised = await say(b, tokens, changed(sampling, **{name: 2.0}))
        (second,) = bias.keys() - {first}
        assert penalised.token_ids == [first, second]


async def lead_of_one(client: WireClient, tokens: list[int]) -> tuple[int, dict[int, float]]:
    """A token, and a bias by which greedy says it twice, the second time one logit ahead of another one."""
    for first in range(20, 60):
        sampling = changed(LONG, max_tokens=2, logprobs=20, logit_bias={first: 90.0})
        forced = await say(client, tokens, sampling)
        before, after = forced.logprobs
        at_most = dict(before.top)
        for second, logprob in after.top:
            theirs = 90.0 - 1.0 - (logprob - after.logprob)
            leads = before.logprob + 90.0 > at_most.get(second, before.top[-1][1]) + theirs + 1.0
            if second != first and abs(theirs) <= 100.0 and leads:
                return first, {first: 90.0, second: theirs}
    raise AssertionError("no two tokens are near enough to each other")


async def test_a_repetition_penalty_reaches_prompt_and_output(pair: Pair) -> None:
    """With so much of it hardly anything is said twice that can be said otherwise."""
    async with pair.connect() as (_, b):
        num_changed = 0
        for number in range(4):
            tokens = make_prompt(b.info, 3 * b.info.block_size, f"repetition {number}")
            plain = await say(b, tokens, LONG)
            penalised = await say(b, tokens, changed(LONG, repetition_penalty=100.0))
            num_changed += plain.token_ids != penalised.token_ids
        assert num_changed


async def test_a_stop_token_ends_it_and_is_the_last(pair: Pair) -> None:
    async with pair.connect() as (_, b):
        tokens = prompt_of(b.info, "stop")
        greedy = (await say(b, tokens, LONG)).token_ids
        stop = greedy[5]
        first = greedy.index(stop)
        stream = await say(b, tokens, changed(LONG, stop_token_ids=(stop,)))
        assert stream.token_ids == greedy[: first + 1] and stream.finished is not None
        assert (stream.finished.reason, stream.finished.stop_token_id) == ("stop", stop)
        assert stream.finished.usage.output_tokens == first + 1
        longer = await say(b, tokens, changed(LONG, stop_token_ids=(stop,), min_tokens=12))
        assert stop not in longer.token_ids[:11] and len(longer.token_ids) >= 12


async def test_the_end_of_sequence_ends_it_unless_it_is_ignored(pair: Pair) -> None:
    async with pair.connect() as (_, b):
        if not b.info.eos_token_ids:
            pytest.skip("the engine declares no end of sequence")
        tokens, eos = prompt_of(b.info, "eos"), b.info.eos_token_ids[0]
        ends = SamplingParams(max_tokens=12, temperature=0.0, logit_bias={eos: 100.0})
        stream = await say(b, tokens, ends)
        assert stream.token_ids == [eos] and stream.finished is not None
        assert (stream.finished.reason, stream.finished.stop_token_id) == ("stop", eos)
        ignored = await say(b, tokens, changed(ends, ignore_eos=True))
        assert ignored.token_ids == [eos] * 12
        assert ignored.finished is not None and ignored.finished.reason == "length"
        later = await say(b, tokens, changed(ends, min_tokens=4))
        assert len(later.token_ids) == 5 and later.token_ids.index(eos) == 4


@pytest.mark.parametrize("count", [None, 0, 1, 20])
async def test_as_many_log_probabilities_as_were_asked_for(pair: Pair, count: int | None) -> None:
    async with pair.connect() as (_, b):
        stream = await say(b, prompt_of(b.info, "count"), changed(LONG, logprobs=count))
        if count is None:
            assert stream.logprobs == []
            return
        assert [len(each.top) for each in stream.logprobs] == [count] * len(stream.token_ids)


SPLIT: dict[str, SamplingParams] = {
    "seed": changed(WARM, seed=9, top_p=0.9),
    "top_k and min_p": changed(WARM, seed=4, top_k=20, min_p=0.02),
    "penalties": changed(LONG, presence_penalty=1.5, frequency_penalty=0.7, repetition_penalty=1.3),
    "log-probabilities": changed(LONG, logprobs=5),
    "min_tokens": SamplingParams(max_tokens=10, min_tokens=10, temperature=0.0),
    "one token": changed(LONG, max_tokens=1),
}


@pytest.mark.sample
@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("first_token", [False, True], ids=["", "first token by the sender"])
async def test_two_engines_choose_as_one_does(pair: Pair, name: str, first_token: bool) -> None:
    async with pair.connect() as (a, b):
        if first_token and not (a.info.does("first_token") and b.info.does("first_token")):
            pytest.skip("the engine declares no first token by the sender")
        sampling, tokens = SPLIT[name], prompt_of(b.info, f"split {name}")
        relayed = await relay(a, b, tokens, len(tokens), sampling=sampling, first_token=first_token)
        cached = () if first_token else (len(tokens),)
        expected = await alone(b, fresh("alone"), tokens, sampling, cached=cached)
        if first_token and sampling.temperature and not b.info.numerics.is_exact:
            # Its randomness may be that of one run of one engine, and another one begins its own.
            assert relayed.answer.token_ids[0] == expected.token_ids[0]
            assert len(relayed.answer.token_ids) == len(expected.token_ids)
            return
        require_equal(relayed.answer, expected, b.info)


# --- what an engine may not have: then it says so -----------------------------------------------------


async def accepted_or_refused(
    client: WireClient, ability: str, tokens: list[int], sampling: SamplingParams, field: str
) -> Stream | None:
    """None of an engine that does not declare the ability: it has refused, by the field's name."""
    if client.info.does(ability):
        return await say(client, tokens, sampling)
    with pytest.raises(RefusedError) as refused:
        await client.start_generate(fresh("refused"), 0, sampling, tokens)
    assert (refused.value.code, refused.value.field) == ("invalid_request", field)
    return None


@pytest.mark.parametrize("count", [0, 3])
async def test_log_probabilities_of_the_prompt(pair: Pair, count: int) -> None:
    """All rows once, in order, also of a prompt that is cached; with a row's token as its chosen one."""
    async with pair.connect() as (_, b):
        tokens = make_prompt(b.info, 2 * b.info.block_size + 3, "rows")
        sampling = changed(LONG, max_tokens=2, prompt_logprobs=count, logprobs=1)
        await say(b, tokens, LONG)
        stream = await accepted_or_refused(b, PROMPT_LOGPROBS, tokens, sampling, "prompt_logprobs")
        if stream is None:
            return
        rows = b"".join(stream.prompt_rows)
        assert len(rows) == (len(tokens) - 1) * 8 * (1 + count)
        assert stream.finished is not None and stream.finished.usage.cached_tokens == 0
        for start in range(0, len(rows), 8 * (1 + count)):
            logprob, rank = struct.unpack_from("<fI", rows, start)
            assert logprob <= 0.0 and 1 <= rank <= b.info.vocab_size
        # The last row of a longer prompt is what is said of that token where it is generated.
        more = await say(b, [*tokens, stream.token_ids[0]], sampling)
        logprob, rank = struct.unpack_from(
            "<fI", b"".join(more.prompt_rows), (len(tokens) - 1) * 8 * (1 + count)
        )
        assert logprob == pytest.approx(stream.logprobs[0].logprob, abs=1e-3) and rank == 1


async def test_log_probabilities_of_a_prompt_that_another_engine_computes_are_refused(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        tokens, sampling = prompt_of(b.info, "rows of others"), changed(LONG, prompt_logprobs=1)
        request_id = fresh("rows")
        grant = await b.prep_recv(request_id, len(tokens), tokens)
        for ask in (
            lambda: b.start_generate(request_id, len(tokens), sampling, None, grant=grant),
            lambda: a.remote_send(request_id, 0, len(tokens), grant, tokens, sampling=sampling),
        ):
            with pytest.raises(RefusedError) as refused:
                await ask()
            assert (refused.value.code, refused.value.field) == ("invalid_request", "prompt_logprobs")
        await b.abort(request_id)


async def test_a_grammar_is_kept_or_refused(pair: Pair) -> None:
    async with pair.connect() as (_, b):
        grammar = Grammar(kind="regex", text="[ab]{6}")
        sampling = SamplingParams(max_tokens=20, temperature=1.0, seed=3, grammar=grammar)
        stream = await accepted_or_refused(b, GRAMMAR, prompt_of(b.info, "grammar"), sampling, "grammar")
        if stream is None:
            return
        assert stream.finished is not None and stream.finished.reason == "stop"
        assert stream.finished.stop_token_id in b.info.eos_token_ids
        free = await say(b, prompt_of(b.info, "grammar"), changed(sampling, grammar=None, ignore_eos=True))
        assert free.token_ids != stream.token_ids
        with pytest.raises(RefusedError) as refused:
            await b.start_generate(
                *(fresh("broken"), 0, changed(sampling, grammar=Grammar(kind="tune", text="a"))),
                prompt_of(b.info, "broken"),
            )
        assert (refused.value.code, refused.value.field) == ("invalid_request", "grammar")


OUT_OF_BOUNDS: list[dict[str, Any]] = [
    {"max_tokens": -1},
    {"max_tokens": 1 << 31},
    {"min_tokens": -1},
    {"min_tokens": 17},
    {"temperature": -0.1},
    {"temperature": 100.5},
    {"temperature": float("nan")},
    {"top_p": 0.0},
    {"top_p": 1.1},
    {"top_k": -1},
    {"top_k": 1 << 31},
    {"min_p": -0.1},
    {"min_p": 1.1},
    {"repetition_penalty": 0.0},
    {"repetition_penalty": float("inf")},
    {"presence_penalty": 2.5},
    {"frequency_penalty": -2.5},
    {"logit_bias": {5: 101.0}},
    {"logit_bias": {5: float("nan")}},
    {"logit_bias": {1 << 33: 1.0}},
    {"logit_bias": lambda info: {info.vocab_size: 1.0}},
    {"logit_bias": {token: 1.0 for token in range(1025)}},
    {"seed": -1},
    {"seed": 1 << 63},
    {"logprobs": -1},
    {"logprobs": 21},
    {"stop_token_ids": (-1,)},
    {"stop_token_ids": lambda info: (info.vocab_size,)},
    {"stop_token_ids": tuple(range(65))},
    {"prompt_logprobs": 21},
    {"grammar": Grammar(kind="choice")},
    {"grammar": Grammar(kind="regex", text="a", after_token_ids=(1 << 40,))},
]


@pytest.mark.parametrize("case", OUT_OF_BOUNDS, ids=lambda case: next(iter(case)))
async def test_out_of_bounds_is_refused_by_name(pair: Pair, case: dict[str, Any]) -> None:
    async with pair.connect() as (_, b):
        ((name, value),) = case.items()
        sampling = changed(SamplingParams(), **{name: value(b.info) if callable(value) else value})
        with pytest.raises(RefusedError) as refused:
            await b.start_generate(fresh("bounds"), 0, sampling, prompt_of(b.info, "bounds"))
        assert (refused.value.code, refused.value.field) == ("invalid_request", name)
        assert refused.value.detail


async def test_what_is_refused_leaves_the_next_one_alone(pair: Pair) -> None:
    """A stream and a refusal beside it, whose parameters would have changed every token."""
    async with pair.connect() as (_, b):
        tokens = prompt_of(b.info, "alone")
        expected = await alone(b, fresh("alone"), tokens, LONG)
        name = fresh("beside")
        await b.start_generate(name, 0, LONG, tokens)
        with pytest.raises(RefusedError):
            await b.start_generate(fresh("bounds"), 0, changed(WARM, top_p=7.0), tokens)
        require_equal(Answer.of(await b.finished(name)), expected, b.info)
