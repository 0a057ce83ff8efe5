"""Token streams: credit, offsets, ends, and a stream that goes on where another engine stopped."""

from __future__ import annotations

import pytest

from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.engine_conformance.answers import Answer, alone, generate, make_prompt, require_equal
from tests.support.engine_conformance.pair import Pair, until_load
from tests.support.engine_conformance.relay import fresh
from tests.support.engine_conformance.wire_client import RefusedError

LONG = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, logprobs=1)


async def test_without_credit_tokens_are_merged_and_none_is_lost(pair: Pair) -> None:
    async with pair.connect() as (_, b), pair.bus() as bus:
        tokens = make_prompt(b.info, 7, "credit")
        expected = await alone(b, fresh("alone"), tokens, LONG)
        slow = pair.client(bus, pair.b)
        slow.gives_credit = False
        await slow.hello(credit=2)
        stream = await slow.start_generate("slow", 0, LONG, tokens)
        await until_load(b, lambda load: load.num_running + load.num_waiting == 0)
        await slow.stats()
        assert stream.num_messages <= 2 and stream.finished is None
        slow.send(wire.Credit(1))
        await slow.finished("slow")
        assert stream.num_messages <= 3
        require_equal(Answer.of(stream), expected, b.info)


async def test_negative_credit_is_ignored_and_boundless_credit_is_clamped(pair: Pair) -> None:
    async with pair.connect() as (_, b):
        b.send(wire.Credit(-5))
        b.send(wire.Credit(1 << 40))
        tokens = make_prompt(b.info, 7, "clamped")
        assert len((await generate(b, "clamped", tokens, LONG)).token_ids) == 40


async def test_the_end_says_what_was_used(pair: Pair) -> None:
    async with pair.connect() as (_, b):
        block = b.info.block_size
        tokens, salt = make_prompt(b.info, 2 * block + 1, "usage"), fresh("usage")
        for cached in (0, 2 * block):
            stream = await generate(b, fresh("usage"), tokens, LONG, salt=salt)
            assert stream.first_offset == 0 and stream.finished is not None
            end = stream.finished
            assert (end.reason, end.code, end.stop_token_id) == ("length", "", None)
            assert (end.usage.prompt_tokens, end.usage.output_tokens) == (len(tokens), 40)
            assert (end.usage.cached_tokens, end.usage.received_tokens) == (cached, 0)
            assert end.numerics.name == b.info.numerics.name
            assert min(end.timings.queued_s, end.timings.prefill_s, end.timings.decode_s) >= 0
            assert len(stream.logprobs) == 40


async def test_salts_share_nothing(pair: Pair) -> None:
    async with pair.connect() as (_, b):
        tokens = make_prompt(b.info, 2 * b.info.block_size, "salts")
        for salt in (fresh("one"), fresh("another"), ""):
            stream = await generate(b, fresh("salted"), tokens, salt=salt)
            assert stream.finished is not None and stream.finished.usage.cached_tokens == 0


@pytest.mark.sample
@pytest.mark.parametrize("delivered", [1, 5, 39])
async def test_a_stream_goes_on_where_another_engine_stopped(pair: Pair, delivered: int) -> None:
    async with pair.connect() as (a, b):
        tokens = make_prompt(a.info, a.info.block_size + 3, "goes on")
        for sampling in (LONG, SamplingParams(max_tokens=40, temperature=0.8, seed=11, ignore_eos=True)):
            whole = await alone(a, fresh("whole"), tokens, sampling)
            so_far = [*tokens, *whole.token_ids[:delivered]]
            request_id = fresh("goes on")
            await b.start_generate(request_id, 0, sampling, so_far, num_output_tokens=delivered)
            rest = await b.finished(request_id)
            assert rest.first_offset == delivered
            assert rest.finished is not None and rest.finished.usage.prompt_tokens == len(tokens)
            if b.info.numerics.is_exact:
                assert rest.token_ids == whole.token_ids[delivered:]
            assert len(rest.token_ids) == 40 - delivered


async def test_no_token_asked_for_is_the_prompt_alone(pair: Pair) -> None:
    async with pair.connect() as (_, b):
        tokens, salt = make_prompt(b.info, 2 * b.info.block_size, "none"), fresh("none")
        stream = await generate(b, fresh("none"), tokens, SamplingParams(max_tokens=0), salt=salt)
        assert stream.token_ids == [] and stream.finished is not None
        assert stream.finished.reason == "length" and stream.finished.usage.output_tokens == 0


async def test_a_prompt_s_tokens_travel_once(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        tokens = make_prompt(a.info, a.info.block_size + 1, "once")
        with pytest.raises(RefusedError) as refused:
            await b.start_generate(fresh("never sent"), 0, LONG, None)
        assert refused.value.code == "unknown_request"
        request_id = fresh("once")
        grant = await b.prep_recv(request_id, len(tokens), tokens)
        with pytest.raises(RefusedError) as refused:
            await b.start_generate(request_id, len(tokens), LONG, tokens[:-1], grant=grant)
        assert (refused.value.code, refused.value.field) == ("invalid_request", "tokens")
        await b.abort(request_id)


async def test_what_takes_too_long_ends_with_its_time(pair: Pair) -> None:
    async with pair.connect() as (_, b):
        tokens = make_prompt(b.info, 5, "time")
        room = b.info.max_model_len - len(tokens)
        endless = SamplingParams(max_tokens=room, ignore_eos=True)
        request_id = fresh("time")
        await b.start_generate(request_id, 0, endless, tokens, ttl_s=0.2)
        stream = await b.finished(request_id)
        assert stream.finished is not None
        assert (stream.finished.reason, stream.finished.code) == ("error", "deadline_exceeded") or (
            stream.finished.reason == "length"  # an engine with a pool so small may be done before
        )


async def test_many_streams_at_once_are_each_their_own(pair: Pair) -> None:
    """More than there are places in a batch; bits depend on company only where that is declared."""
    async with pair.connect() as (_, b):
        num = max(6, min((await b.stats()).load.max_num_seqs, 12)) + 4
        prompts = [make_prompt(b.info, 3 + number, "many") for number in range(num)]
        names = [fresh("many") for _ in prompts]
        for name, tokens in zip(names, prompts, strict=True):
            await b.start_generate(name, 0, LONG, tokens)
        for name, tokens in zip(names, prompts, strict=True):
            got = Answer.of(await b.finished(name))
            assert len(got.token_ids) == len(got.logprobs) == 40
            if b.info.numerics.is_exact:
                require_equal(got, await alone(b, fresh("alone"), tokens, LONG), b.info)


async def test_heartbeats_tell_of_progress_under_load(pair: Pair) -> None:
    async with pair.connect() as (_, b):
        before = (await b.stats()).load
        tokens = make_prompt(b.info, 3 * b.info.block_size, "load")
        room = min(b.info.max_model_len, b.info.num_blocks * b.info.block_size // 4) - len(tokens) - 1
        names = [fresh("load") for _ in range(3)]
        for name in names:
            await b.start_generate(name, 0, SamplingParams(max_tokens=room, ignore_eos=True), tokens)
        busy = await until_load(b, lambda load: load.num_running > 0 and load.progress > before.progress)
        assert busy.free_blocks < before.free_blocks
        seen = len(b.heartbeats)
        for name in names:
            await b.finished(name, 120.0)
        await pair.settled(b)
        await b.until(lambda: len(b.heartbeats) > seen)
        progress = [beat.load.progress for beat in b.heartbeats]
        assert progress == sorted(progress)
        after = (await b.stats()).load
        assert after.progress > busy.progress and after.num_steps > before.num_steps
        assert after.prefill_tokens_per_s > 0 and after.decode_step_s > 0


async def test_counters_only_grow(pair: Pair) -> None:
    async with pair.connect() as (_, b):
        before = (await b.stats()).counters
        await generate(b, fresh("counted"), make_prompt(b.info, 5, "counted"))
        after = (await b.stats()).counters
        gauges = ("records", "routers")
        fallen = [name for name in before if name not in gauges and after.get(name, 0) < before[name]]
        assert not fallen, (before, after)
