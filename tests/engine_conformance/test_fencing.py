"""A write after the close is impossible: a sender that stood still comes back to a grant that is over.

The receiver's blocks are given to canaries meanwhile: prompts that fill its pool, and whose KV, read from the
cache afterwards, must be what it was.
"""

from __future__ import annotations

import asyncio

import pytest

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

ATTEMPTS = 20
SILENCE_S = 5.0
"""After which a router is lost: the suite's `bus.liveness` of heartbeats."""


async def fill(client: WireClient, name: str, free_blocks: int) -> list[tuple[str, list[int]]]:
    """Prompts, with their salts, that take every free block of the engine's pool one after another."""
    block = client.info.block_size
    length = max(1, min(free_blocks // 4, (client.info.max_model_len - 8) // block - 1)) * block + 1
    canaries = []
    for number in range(-(-free_blocks * block // length) + 1):
        tokens, salt = make_prompt(client.info, length, f"{name} {number}"), fresh("canary")
        await generate(client, fresh("canary"), tokens, salt=salt)
        canaries.append((salt, tokens))
    return canaries


async def unharmed(client: WireClient, canaries: list[tuple[str, list[int]]]) -> None:
    """What the cache still has of them gives the answers of one engine alone."""
    num_hits = 0
    for salt, tokens in reversed(canaries):
        stream = await generate(client, fresh("canary"), tokens, salt=salt)
        assert stream.finished is not None
        cached = stream.finished.usage.cached_tokens
        num_hits += cached > 0
        require_equal(
            Answer.of(stream), await alone(client, fresh("alone"), tokens, cached=[cached]), client.info
        )
    assert num_hits, "no canary was left in the cache"


@pytest.mark.sample
async def test_a_send_behind_the_close_writes_nothing(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        tokens, request_id = make_prompt(a.info, 6 * a.info.block_size, "closed"), fresh("closed")
        grant = await b.prep_recv(request_id, len(tokens), tokens)
        await b.release(request_id, grant)
        canaries = await fill(b, "closed", (await pair.settled(b)).free_blocks)
        with pytest.raises(RefusedError) as refused:
            await a.remote_send(request_id, 0, len(tokens), grant, tokens)
        assert refused.value.code == "transfer_failed"
        await unharmed(b, canaries)


@pytest.mark.sample
@pytest.mark.parametrize("over", ["by abort", "by lease"])
async def test_a_sender_that_froze_in_its_send_writes_nothing_when_it_thaws(pair: Pair, over: str) -> None:
    """It is stopped between two layers, somewhere; until it lives again what it holds is nobody's."""
    async with pair.connect() as (one, two):
        # The first one's leases are short.
        a, b, sender = (one, two, pair.a) if over == "by abort" else (two, one, pair.b)
        length = min(
            40 * a.info.block_size, b.info.num_blocks * b.info.block_size // 3, a.info.max_model_len - 8
        )
        free = pair.free_blocks[b.info.engine_id]
        for attempt in range(ATTEMPTS):
            tokens, request_id = make_prompt(a.info, length, f"frozen {over} {attempt}"), fresh("frozen")
            grant = await b.prep_recv(request_id, length, tokens)
            before = (await a.stats()).load.progress
            sending = a.begin_send(request_id, 0, length, grant, tokens)
            await until_load(a, lambda load: load.progress > before)  # noqa: B023
            sender.freeze()
            try:
                if over == "by abort":
                    await b.abort(request_id)
                load = await until_load(
                    b,
                    lambda load: load.num_grants == 0 and load.free_blocks + load.quarantined_blocks == free,
                )
                assert load.quarantined_blocks in (0, len(grant.blocks))
                canaries = await fill(b, f"frozen {over} {attempt}", load.free_blocks)
                held = (await b.stats()).load.quarantined_blocks
                assert held == load.quarantined_blocks, "nobody has proven that no write can come"
            finally:
                sender.thaw()
            await a.until(sending.done)
            was_caught = sending.exception() is not None
            if was_caught:
                failure = sending.exception()
                assert isinstance(failure, RefusedError) and failure.code == "transfer_failed"
            await pair.settled(a)
            await pair.settled(b)
            await unharmed(b, canaries)
            if was_caught and load.quarantined_blocks:
                # Taken at once: the way may have to be made anew, which may take longer than a short lease.
                await check_relay(a, b, tokens, length, generate_first=True)
                return
        raise AssertionError(f"none of {ATTEMPTS} sends was caught in the middle")


async def test_an_engine_that_froze_does_not_take_that_for_its_router_s_silence(pair: Pair) -> None:
    """It stood still for longer than a router may be silent; what was said meanwhile waits in its socket."""
    async with pair.connect() as (a, b):
        tokens = make_prompt(a.info, 5, "stood still")
        stream = await a.start_generate("stood still", 0, GREEDY, tokens)
        pair.a.freeze()
        try:
            now = asyncio.get_running_loop().time
            over = now() + SILENCE_S + 1.0
            await b.until(lambda: now() > over)
        finally:
            pair.a.thaw()
        await a.finished("stood still")
        assert len(stream.token_ids) == GREEDY.max_tokens and not a.told
