"""Every split of a prompt around block edges, with prefix hits on either side: one engine's tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from microserve.protocol.messages.engine_info import EngineInfo
from tests.support.engine_conformance.answers import GREEDY, Answer, alone, make_prompt
from tests.support.engine_conformance.declared import matches
from tests.support.engine_conformance.pair import Pair
from tests.support.engine_conformance.relay import check_relay, fresh, relay
from tests.support.process.cases import Case


def around(info: EngineInfo, length: int) -> list[int]:
    """0, +-1 around every edge of a block, and the prompt's end."""
    edges = range(0, length + 1, info.block_size)
    near = {edge + step for edge in edges for step in (-1, 0, 1)} | {length - 1, length}
    return sorted(each for each in near if 0 <= each <= length)


@pytest.mark.sample
@pytest.mark.parametrize("blocks, more", [(0, 1), (1, -1), (1, 0), (1, 1), (2, 3)])
async def test_every_end_around_block_edges(pair: Pair, blocks: int, more: int) -> None:
    async with pair.connect() as (a, b):
        tokens = make_prompt(a.info, blocks * a.info.block_size + more, "ends")
        for end in around(a.info, len(tokens)):
            await check_relay(a, b, tokens, end)


@pytest.mark.parametrize("there", [0, 1, 2])
@pytest.mark.parametrize("here", [0, 1, 2])
async def test_prefix_hits_on_either_side(pair: Pair, there: int, here: int) -> None:
    """So many blocks are cached; the prompt has two and a piece."""
    async with pair.connect() as (a, b):
        block = a.info.block_size
        tokens = make_prompt(a.info, 2 * block + 3, "hits")
        for end in (block, block + 1, 2 * block, len(tokens)):
            relayed = await check_relay(a, b, tokens, end, there=there * block, here=here * block)
            cached_there = min(there * block, end // block * block)
            assert sum(each.cached for each in relayed.sent) <= max(cached_there, 0)


async def test_a_full_hit_moves_nothing(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        tokens = make_prompt(a.info, 2 * a.info.block_size, "full hit")
        relayed = await check_relay(a, b, tokens, len(tokens), here=len(tokens))
        if b.info.recompute_tokens == 0:
            assert relayed.grant.blocks == [] and relayed.sent == []


async def test_negative_bounds_count_from_the_prompt_s_end(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        tokens = make_prompt(a.info, 2 * a.info.block_size + 5, "negative")
        request_id = fresh("negative")
        grant = await b.prep_recv(request_id, -5, tokens)
        assert (grant.matched, grant.end) == (0, len(tokens) - 5)
        sent = await a.remote_send(request_id, -len(tokens), -5, grant, tokens)
        assert sent.sent == len(tokens) - 5
        await b.start_generate(request_id, -5, GREEDY, None, grant=grant, numerics=a.info.numerics.name)
        got = Answer.of(await b.finished(request_id))
        assert got.token_ids == (await alone(b, fresh("alone"), tokens, cached=[len(tokens) - 5])).token_ids


@pytest.mark.sample
@pytest.mark.parametrize("more", [0, 3])
async def test_two_senders_each_in_a_lane(pair: Pair, more: int) -> None:
    """The same engine twice, in two lanes of one grant; then they meet at an edge or inside of a block."""
    async with pair.connect() as (a, b):
        tokens = make_prompt(a.info, 4 * a.info.block_size + more, "lanes")
        relayed = await check_relay(a, b, tokens, len(tokens), num_lanes=2)
        assert len(relayed.sent) == 2
        for there, here in ((2, 0), (0, 1), (3, 1)):
            block = a.info.block_size
            await check_relay(a, b, tokens, len(tokens), there=there * block, here=here * block, num_lanes=3)


async def test_generate_before_send(pair: Pair) -> None:
    """``StartGenerate`` may come first: the engine waits for KV, not for the order of messages."""
    async with pair.connect() as (a, b):
        block = a.info.block_size
        tokens = make_prompt(a.info, 3 * block + 2, "early")
        for end in (block, 2 * block + 1, 3 * block, len(tokens)):
            await check_relay(a, b, tokens, end, generate_first=True)
            await check_relay(a, b, tokens, end, generate_first=True, there=block, here=block)


async def test_the_sender_brings_the_first_token(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        block = a.info.block_size
        for length in (1, block - 1, block, block + 1, 3 * block):
            tokens = make_prompt(a.info, length, "first")
            await check_relay(a, b, tokens, length, first_token=True)
            await check_relay(a, b, tokens, length, first_token=True, generate_first=True)


async def test_the_same_prompt_again_finds_what_was_received(pair: Pair) -> None:
    """KV that came from another engine is prefix cache like any other, and is sent on like any other."""
    async with pair.connect() as (a, b):
        block = a.info.block_size
        tokens, salt = make_prompt(a.info, 3 * block + 1, "again"), fresh("again")
        first = await relay(a, b, tokens, 3 * block, salt=salt)
        second = await relay(b, a, tokens, 3 * block, salt=salt)
        full = matches(b.info, 3 * block, 3 * block)
        assert second.grant.matched in full, "the sender of the first has it cached"
        third = await relay(a, b, tokens, 3 * block, salt=salt)
        assert third.grant.matched in full
        assert first.answer.token_ids == second.answer.token_ids == third.answer.token_ids


@pytest.mark.sample
async def test_tokens_are_those_of_transformers(pair: Pair) -> None:
    """An oracle that shares no code with the engines, for a random model in fp32."""
    from tests.support.process.exactness import oracle

    if not pair.launch.oracle:
        pytest.skip("the engines that a file describes may have any model, in any dtype")
    async with pair.connect() as (a, b):
        tokens = make_prompt(a.info, 3 * a.info.block_size + 5, "transformers")
    # Between two connections: it takes long at first, and a router that says nothing meanwhile is lost.
    expected = oracle(Path(pair.launch.model), [Case(tuple(tokens), GREEDY)])[0]
    async with pair.connect() as (a, b):
        for end in (1, a.info.block_size, len(tokens) - 1, len(tokens)):
            assert (await relay(a, b, tokens, end)).answer.token_ids == expected
