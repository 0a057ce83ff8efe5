"""Much at once: two senders, what is evicted in between, and random schedules."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.support.engine_conformance.answers import (
    GREEDY,
    Answer,
    alone,
    generate,
    make_prompt,
    require_equal,
    warm,
)
from tests.support.engine_conformance.declared import splits
from tests.support.engine_conformance.engine_process import EngineProcess
from tests.support.engine_conformance.pair import Pair
from tests.support.engine_conformance.relay import check_relay, fresh, relay
from tests.support.engine_conformance.wire_client import RefusedError, WireClient

FULL = ("grants_full", "cache_full", "queue_full")


async def test_two_engines_send_in_two_lanes(pair: Pair, third: EngineProcess) -> None:
    """Each its part of one grant, one after the other and both at once."""
    async with pair.connect() as (a, b), pair.bus() as bus:
        c = pair.client(bus, third)
        await c.hello()
        block = b.info.block_size
        for number, (more, both) in enumerate(((0, False), (0, True), (5, True))):
            tokens, request_id = make_prompt(b.info, 4 * block + more, f"two {number}"), fresh("two")
            middle = splits(c.info, 2 * block)
            grant = await b.prep_recv(request_id, len(tokens), tokens)
            await b.start_generate(
                *(request_id, len(tokens), GREEDY, None), grant=grant, numerics=a.info.numerics.name
            )
            first = a.begin_send(request_id, 0, middle, grant, tokens, lane=0)
            if not both:
                await a.until(first.done)
            second = c.begin_send(request_id, middle, len(tokens), grant, tokens, lane=1)
            await a.until(first.done)
            await c.until(second.done)
            assert first.exception() is None and second.exception() is None
            got = Answer.of(await b.finished(request_id))
            require_equal(got, await alone(b, fresh("alone"), tokens, cached=[len(tokens)]), b.info)
        await pair.settled(c)


async def test_one_of_two_senders_gives_up(pair: Pair, third: EngineProcess) -> None:
    """The stream fails by name, and the other sender is none the worse."""
    async with pair.connect() as (a, b), pair.bus() as bus:
        c = pair.client(bus, third)
        await c.hello()
        tokens, request_id = make_prompt(b.info, 4 * b.info.block_size, "gives up"), fresh("gives up")
        middle = splits(c.info, len(tokens) // 2)
        grant = await b.prep_recv(request_id, len(tokens), tokens)
        await b.start_generate(
            *(request_id, len(tokens), GREEDY, None), grant=grant, numerics=a.info.numerics.name, ttl_s=2.0
        )
        await a.remote_send(request_id, 0, middle, grant, tokens, lane=0)
        await c.abort(request_id)
        stream = await b.finished(request_id)
        assert stream.finished is not None and stream.finished.reason == "error" and not stream.token_ids
        await pair.settled(c)


async def test_what_the_sender_had_cached_is_evicted_before_the_send(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        block, free = a.info.block_size, pair.free_blocks[a.info.engine_id]
        tokens, salt = make_prompt(a.info, 3 * block + 1, "evicted"), fresh("evicted")
        await warm(a, fresh("warm"), tokens, salt)
        request_id = fresh("evicted")
        grant = await b.prep_recv(request_id, len(tokens), tokens, salt=salt)
        length = max(1, min(free // 4, (a.info.max_model_len - 8) // block)) * block
        for number in range(-(-free * block // length) + 2):
            await generate(
                a, fresh("fill"), make_prompt(a.info, length, f"fill {number}"), salt=fresh("fill")
            )
        sent = await a.remote_send(request_id, 0, len(tokens), grant, tokens, salt=salt)
        assert sent.cached < 3 * block and sent.computed + sent.cached >= len(tokens) - 1
        await b.start_generate(
            *(request_id, len(tokens), GREEDY, None), grant=grant, numerics=a.info.numerics.name, salt=salt
        )
        got = Answer.of(await b.finished(request_id))
        require_equal(got, await alone(b, fresh("alone"), tokens, cached=[len(tokens)]), b.info)


async def test_a_grant_is_given_or_refused_while_prompts_are_computed(pair: Pair) -> None:
    """Never a silent wait: an answer comes while the engine is busy."""
    async with pair.connect() as (_, b):
        length = min(b.info.max_model_len - 8, pair.free_blocks[b.info.engine_id] * b.info.block_size // 6)
        names = [fresh("prefill") for _ in range(3)]
        for name in names:
            await b.start_generate(name, 0, GREEDY, make_prompt(b.info, length, name))
        request_id = fresh("busy")
        try:
            grant = await b.prep_recv(request_id, 9, make_prompt(b.info, 9, "busy"))
            await b.release(request_id, grant)
        except RefusedError as refused:
            assert refused.code in FULL
        for name in names:
            await b.finished(name)


@pytest.mark.parametrize("name", ["x" * 128, "with a space", "é日本😀", "../../etc", "%s{0}\n", "-1", "0"])
async def test_a_request_may_have_any_name(pair: Pair, name: str) -> None:
    async with pair.connect() as (a, b):
        tokens = make_prompt(a.info, a.info.block_size + 1, name)
        grant = await b.prep_recv(name, len(tokens), tokens)
        await a.remote_send(name, 0, len(tokens), grant, tokens)
        await b.start_generate(*(name, len(tokens), GREEDY, None), grant=grant, numerics=a.info.numerics.name)
        assert len((await b.finished(name)).token_ids) == GREEDY.max_tokens


@pytest.mark.sample
@pytest.mark.parametrize("seed", range(3))
async def test_random_schedules(pair: Pair, third: EngineProcess, seed: int) -> None:
    """Relays in either direction, of prompts that share prefixes, many at once, some aborted: those that end
    say what one engine says, and nothing stays."""
    async with pair.connect() as (_, b), pair.bus() as bus:
        a = pair.client(bus, third)
        await a.hello()
        rng = random.Random(seed)
        block = a.info.block_size
        stems = [make_prompt(a.info, rng.randrange(1, 4) * block, f"stem {seed} {each}") for each in range(3)]
        salt, gate = fresh("random"), asyncio.Semaphore(6)
        served: list[tuple[list[int], Answer]] = []

        async def one() -> None:
            tokens = rng.choice(stems) + make_prompt(a.info, rng.randrange(1, block + 3), rng.random().hex())
            sender, receiver = rng.choice([(a, b), (b, a)])
            end = rng.choice([rng.randrange(len(tokens) + 1), len(tokens), len(tokens) // block * block])
            is_aborted, lanes, first = rng.random() < 0.25, rng.randrange(1, 4), rng.random() < 0.5
            async with gate:
                if is_aborted:
                    await abandoned(sender, receiver, tokens, end, salt, rng.randrange(4))
                    return
                try:
                    relayed = await relay(
                        *(sender, receiver, tokens, end), num_lanes=lanes, generate_first=first, salt=salt
                    )
                except RefusedError as refused:
                    assert refused.code in FULL
                    return
                served.append((tokens, relayed.answer))

        await asyncio.gather(*(one() for _ in range(40)))
        assert len(served) >= 20
        await pair.settled(a)
        await pair.settled(b)
        for tokens, answer in served:
            if a.info.numerics.is_exact:
                require_equal(answer, await alone(a, fresh("alone"), tokens), a.info)
            assert len(answer.token_ids) == GREEDY.max_tokens


async def abandoned(
    sender: WireClient, receiver: WireClient, tokens: list[int], end: int, salt: str, phase: int
) -> None:
    """A relay that is broken off after so many of its messages."""
    request_id = fresh("abandoned")
    try:
        grant = await receiver.prep_recv(request_id, end, tokens, salt=salt)
        if phase >= 1 and grant.matched < end:
            sending = sender.begin_send(request_id, 0, end, grant, tokens, salt=salt)
            if phase >= 3:
                await sender.until(sending.done)
        if phase >= 2:
            await receiver.start_generate(
                *(request_id, end, GREEDY, None), grant=grant, salt=salt, numerics=sender.info.numerics.name
            )
    except RefusedError as refused:
        assert refused.code in (*FULL, "unknown_request")
    await asyncio.gather(receiver.abort(request_id), sender.abort(request_id))


@pytest.mark.heavy
@pytest.mark.timeout(1_800)
async def test_five_hundred_splits(pair: Pair) -> None:
    """Any prompt, any split, any hits, any way: each against one engine with the same prefix in its cache.

    Of a class that is not exact, one engine comes to the same bits by the same path of computation alone:
    where the receiver had nothing of its own, and the sender no more than it sends. In float32 other paths
    differ by less than the tolerance.
    """
    async with pair.connect() as (a, b):
        rng, block = random.Random(500), a.info.block_size
        any_path = a.info.numerics.is_exact or a.info.geometry.dtype == "float32"
        longest = min(6 * block, a.info.max_model_len - 8)
        for number in range(500):
            tokens = make_prompt(a.info, rng.randrange(1, longest), f"five hundred {number}")
            end = rng.choice([rng.randrange(len(tokens) + 1), len(tokens), len(tokens) // block * block])
            await check_relay(
                *(a, b, tokens, end),
                there=rng.randrange((len(tokens) if any_path else end) // block + 1) * block,
                here=rng.randrange(len(tokens) // block + 1) * block if any_path else 0,
                num_lanes=rng.randrange(1, 4),
                first_token=end == len(tokens) and rng.random() < 0.5,
                generate_first=rng.random() < 0.5,
            )
