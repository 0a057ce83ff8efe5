"""KV events are the cache: what a reader makes of snapshot and events is what the engine matches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from microserve.protocol.messages.kv.kv_events import Published, parse_replay_answer, replay_request
from tests.support.engine_conformance.answers import generate, make_prompt
from tests.support.engine_conformance.cache_reader import CacheReader
from tests.support.engine_conformance.pair import Pair
from tests.support.engine_conformance.relay import fresh, relay
from tests.support.engine_conformance.wire_client import WireClient


@asynccontextmanager
async def reading(pair: Pair) -> AsyncIterator[tuple[WireClient, WireClient, CacheReader]]:
    """A reader of ``b``'s events, live."""
    async with pair.connect() as (a, b), pair.bus("index") as bus:
        reader = CacheReader(bus, b)
        await reader.start()
        yield a, b, reader


async def matched(client: WireClient, tokens: list[int], salt: str) -> int:
    """What the engine itself says of a prompt. It is asked for one token more: it may need the last block."""
    request_id = fresh("asks")
    grant = await client.prep_recv(request_id, len(tokens) + 1, [*tokens, 19], salt=salt)
    await client.release(request_id, grant)
    return grant.matched


async def test_what_is_computed_is_announced(pair: Pair) -> None:
    async with reading(pair) as (_, b, reader):
        block, salt = b.info.block_size, fresh("computed")
        tokens = make_prompt(b.info, 2 * block + 3, "computed")
        assert reader.book.matched(tokens, salt) == 0
        stream = await generate(b, fresh("computed"), tokens, salt=salt)
        book = await reader.catch_up()
        whole = tokens + stream.token_ids
        assert book.matched(tokens, salt) == 2 * block == await matched(b, tokens, salt)
        assert book.matched(whole, salt) == await matched(b, whole, salt)
        assert book.matched(tokens, "") == 0 == await matched(b, tokens, "")
        assert book.matched(tokens[:block], salt) == block
        assert book.matched([*tokens[: block - 1], 19], salt) == 0


@pytest.mark.sample
async def test_what_is_received_is_announced_when_it_is_cache_and_not_before(pair: Pair) -> None:
    async with reading(pair) as (a, b, reader):
        block, salt = b.info.block_size, fresh("received")
        tokens = make_prompt(b.info, 3 * block, "received")
        request_id = fresh("received")
        grant = await b.prep_recv(request_id, len(tokens), tokens, salt=salt)
        assert (await reader.catch_up()).matched(tokens, salt) == 0
        await a.remote_send(request_id, 0, len(tokens), grant, tokens, salt=salt)
        assert (await reader.catch_up()).matched(tokens, salt) == 0, "nobody has said what becomes of it"
        await b.commit(request_id, grant, numerics=a.info.numerics.name)
        async with asyncio.timeout(60):  # an engine may learn from its cache a moment later
            while (await reader.catch_up()).matched(tokens, salt) < 3 * block:
                await asyncio.sleep(0.02)
        assert await matched(b, tokens, salt) == 3 * block


async def test_what_was_generated_behind_received_kv_is_announced(pair: Pair) -> None:
    async with reading(pair) as (a, b, reader):
        block, salt = b.info.block_size, fresh("behind")
        tokens = make_prompt(b.info, 3 * block + 1, "behind")
        await relay(a, b, tokens, 2 * block + 1, salt=salt)
        await pair.settled(b)
        book = await reader.catch_up()
        assert book.matched(tokens, salt) == await matched(b, tokens, salt) == 3 * block


async def test_what_a_grant_brought_in_vain_is_never_announced(pair: Pair) -> None:
    async with reading(pair) as (a, b, reader):
        block, salt = b.info.block_size, fresh("vain")
        tokens = make_prompt(b.info, 2 * block, "vain")
        request_id = fresh("vain")
        grant = await b.prep_recv(request_id, len(tokens), tokens, salt=salt)
        await a.remote_send(request_id, 0, len(tokens), grant, tokens, salt=salt)
        await b.release(request_id, grant)
        await pair.settled(b)
        assert (await reader.catch_up()).matched(tokens, salt) == 0 == await matched(b, tokens, salt)


async def test_what_is_evicted_is_announced(pair: Pair) -> None:
    """Twice the pool of prompts, none like another: for each the book says what the engine matches."""
    async with reading(pair) as (_, b, reader):
        block, free = b.info.block_size, pair.free_blocks[b.info.engine_id]
        length = max(2, min(free // 5, (b.info.max_model_len - 8) // block)) * block
        served = []
        for number in range(2 * free * block // length + 1):
            tokens, salt = make_prompt(b.info, length, f"evicted {number}"), fresh("evicted")
            await generate(b, salt, tokens, salt=salt)
            served.append((tokens, salt))
        await pair.settled(b)
        book = await reader.catch_up()
        assert reader.num_events["BlockRemoved"] + reader.num_events["AllBlocksCleared"] > 0
        assert len(book.blocks) <= b.info.num_blocks
        predicted = [book.matched(tokens, salt) for tokens, salt in served]
        assert max(predicted) == length and min(predicted) < length
        for tokens, salt in reversed(served):
            # Who asks takes a block, for which another one may go: the book is read anew each time.
            async with asyncio.timeout(60):
                while expected := (await reader.catch_up()).matched(tokens, salt):
                    if await matched(b, tokens[:expected], salt) == expected:
                        break
        await reader.catch_up()


async def test_numbers_have_no_gap_and_a_replay_tells_the_same(pair: Pair) -> None:
    async with reading(pair) as (_, b, reader), pair.bus("index") as bus:
        first, _ = await reader.snapshot()
        for number in range(5):
            await generate(b, fresh("gap"), make_prompt(b.info, 2 * b.info.block_size, f"gap {number}"))
        last, _ = await reader.snapshot()
        assert last > first
        await reader.catch_up()
        answers: list[Published | None] = []

        def take(frames: list[bytes]) -> None:
            answers.append(parse_replay_answer(frames))
            b.stir()

        replay = bus.client(b.info.replay_address, take, server_key=b.info.events_key)
        replay.send(replay_request(first))
        await b.until(lambda: bool(answers) and answers[-1] is None)
        numbers = [each.seq for each in answers if each is not None]
        assert numbers == list(range(first, first + len(numbers))) and numbers[-1] >= last - 1
