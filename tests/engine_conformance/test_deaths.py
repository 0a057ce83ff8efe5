"""Engines that are killed, and engines that leave: nothing wrong is said, nothing is lost with them, and
another life of them serves."""

from __future__ import annotations

import asyncio

import pytest

from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.engine_conformance.answers import (
    GREEDY,
    Answer,
    alone,
    generate,
    make_prompt,
    require_equal,
)
from tests.support.engine_conformance.pair import Pair, until_load
from tests.support.engine_conformance.relay import check_relay, fresh
from tests.support.engine_conformance.wire_client import RefusedError, WireClient

pytestmark = pytest.mark.slow
"""Each test starts engines anew."""
ENDLESS = SamplingParams(max_tokens=1_000, ignore_eos=True)
LOST = ("transfer_failed", "engine_lost")


def long_length(client: WireClient) -> int:
    """Of a prompt that takes many steps, and room for three of which is in a pool's half."""
    info = client.info
    return min(20 * info.block_size, info.num_blocks * info.block_size // 7, info.max_model_len - 8)


async def begin_relay(
    a: WireClient, b: WireClient, name: str
) -> tuple[str, list[int], asyncio.Future[tuple[wire.EngineReply, list[bytes]]]]:
    """A send that is under way, for a stream that waits."""
    request_id, tokens = fresh(name), make_prompt(a.info, long_length(a), fresh(name))
    grant = await b.prep_recv(request_id, len(tokens), tokens)
    await b.start_generate(request_id, len(tokens), GREEDY, None, grant=grant, numerics=a.info.numerics.name)
    return request_id, tokens, a.begin_send(request_id, 0, len(tokens), grant, tokens)


@pytest.mark.parametrize("layers", [2, 9])
async def test_a_sender_is_killed_at_some_layer(mortal_pair: Pair, layers: int) -> None:
    """What waits for it fails by name or is whole and right; the next one of the same prompt is clean, and so
    is what gets its blocks."""
    pair = mortal_pair
    async with pair.bus() as bus:
        a, b = (pair.client(bus, engine) for engine in (pair.a, pair.b))
        await a.hello()
        await b.hello()
        before = (await a.stats()).load.progress
        request_id, tokens, _ = await begin_relay(a, b, "killed")
        # Another behind it, which may not have begun to write: then only its router knows that it never will.
        second, committed = make_prompt(a.info, long_length(a), fresh("killed")), fresh("committed")
        grant = await b.prep_recv(committed, len(second), second)
        committing = b.begin(lambda call: wire.Commit(call, committed, grant.grant_id, 100.0))
        a.begin_send(committed, 0, len(second), grant, second)
        await until_load(a, lambda load: load.progress >= before + layers)
        pair.a.kill()
        a.close()

        stream = await b.finished(request_id)
        assert stream.finished is not None
        if stream.finished.reason == "error":
            assert stream.finished.code in LOST and not stream.token_ids
        await b.abort(committed)
        await b.until(committing.done)
        if (failure := committing.exception()) is not None:
            assert isinstance(failure, RefusedError) and failure.code in LOST
        await pair.settled(b)

        for prompt in (tokens, second):
            got = Answer.of(await generate(b, fresh("clean"), prompt))
            cached = len(prompt) // b.info.block_size * b.info.block_size
            expected = await alone(b, fresh("alone"), prompt)
            assert got.token_ids == expected.token_ids
            again = Answer.of(await generate(b, fresh("clean"), prompt))
            require_equal(again, await alone(b, fresh("alone"), prompt, cached=[cached]), b.info)
    await pair.restart(pair.a)
    async with pair.connect() as (a, b):
        await check_relay(a, b, make_prompt(a.info, long_length(a), fresh("reborn")), long_length(a))


async def test_a_receiver_is_killed_while_it_receives(mortal_pair: Pair) -> None:
    """The sender says so and serves on; what the old life granted means nothing to the next."""
    pair = mortal_pair
    async with pair.bus() as bus:
        a, b = (pair.client(bus, engine) for engine in (pair.a, pair.b))
        await a.hello()
        await b.hello()
        old = b.info.incarnation
        before = (await a.stats()).load.progress
        spare = make_prompt(a.info, long_length(a), fresh("spare"))
        unused = await b.prep_recv("unused", len(spare), spare)
        request_id, tokens, sending = await begin_relay(a, b, "orphan")
        await until_load(a, lambda load: load.progress > before)
        pair.b.kill()
        b.close()
        # An engine may put what is left into memory that nobody reads any more: then it has Sent.
        await a.until(sending.done)
        if (failure := sending.exception()) is not None:
            assert isinstance(failure, RefusedError) and failure.code in LOST
        with pytest.raises(RefusedError) as refused:
            await a.remote_send("unused", 0, len(spare), unused, spare)
        assert refused.value.code in LOST
        await pair.settled(a)
        await generate(a, fresh("serves on"), tokens)
        await pair.restart(pair.b)
        b = pair.client(bus, pair.b)
        await b.hello()
        assert b.info.engine_id == pair.b.name and b.info.incarnation != old
        with pytest.raises(RefusedError) as refused:
            await b.start_generate(request_id, len(tokens), GREEDY, tokens, grant=unused)
        assert refused.value.code == "unknown_request"
        with pytest.raises(RefusedError) as refused:
            await a.remote_send("unused again", 0, len(spare), unused, spare)
        assert refused.value.code in LOST
        await check_relay(a, b, tokens, len(tokens))
        await pair.settled(b)


async def test_an_engine_that_is_told_to_leave_serves_what_it_has_and_goes(mortal_pair: Pair) -> None:
    pair = mortal_pair
    async with pair.bus() as bus, pair.bus("operator") as operators:
        a, b = (pair.client(bus, engine) for engine in (pair.a, pair.b))
        await a.hello()
        await b.hello()
        tokens = make_prompt(a.info, 3 * a.info.block_size, fresh("drain"))
        await a.start_generate("last", 0, SamplingParams(max_tokens=60, ignore_eos=True), tokens)
        request_id = fresh("moves")
        grant = await b.prep_recv(request_id, len(tokens), tokens)
        with pytest.raises(RefusedError) as refused:
            await a.ask(wire.Done, lambda call: wire.Drain(call, a.info.incarnation))
        assert refused.value.code == "not_permitted", "a router has no right to that"

        operator = pair.client(operators, pair.a)
        await operator.hello(credit=0)
        with pytest.raises(RefusedError) as refused:
            await operator.ask(wire.Done, lambda call: wire.Drain(call, a.info.incarnation + 2))
        assert (refused.value.code, refused.value.field) == ("invalid_request", "incarnation")
        await operator.ask(wire.Done, lambda call: wire.Drain(call, a.info.incarnation))
        await a.until(lambda: any(beat.load.draining for beat in a.heartbeats))
        for build in (
            lambda call: wire.StartGenerate(call, "new", 0, GREEDY, 9.0),
            lambda call: wire.PrepRecv(call, "new", 1, 9.0),
        ):
            with pytest.raises(RefusedError) as refused:
                await a.ask(object, build, b"\x20\0\0\0")
            assert refused.value.code == "draining"
        sent = await a.remote_send(request_id, 0, len(tokens), grant, tokens)
        assert sent.sent == len(tokens), "contexts leave an engine that drains"
        assert len((await a.finished("last")).token_ids) == 60
        assert await b.commit(request_id, grant, numerics=a.info.numerics.name) == len(tokens)
        assert await pair.a.ended() == 0
    await pair.restart(pair.a)


async def test_an_engine_ends_by_sigterm(mortal_pair: Pair) -> None:
    pair = mortal_pair
    async with pair.connect() as (a, b):
        await check_relay(b, a, make_prompt(a.info, a.info.block_size + 1, fresh("term")), a.info.block_size)
    pair.a.process.terminate()
    assert await pair.a.ended() == 0
    await pair.restart(pair.a)
    async with pair.connect() as (a, b):
        await check_relay(b, a, make_prompt(a.info, a.info.block_size + 1, fresh("term")), a.info.block_size)
