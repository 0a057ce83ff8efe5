"""An abort in every phase ends everything under its id: no word more of it, and every block comes back."""

from __future__ import annotations

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
from tests.support.engine_conformance.declared import splits
from tests.support.engine_conformance.pair import Pair, until_load
from tests.support.engine_conformance.relay import check_relay, fresh
from tests.support.engine_conformance.wire_client import RefusedError, Stream, WireClient

ENDLESS = SamplingParams(max_tokens=1_000, ignore_eos=True)


async def still_exact(pair: Pair, a: WireClient, b: WireClient, tokens: list[int]) -> None:
    """Both engines hold nothing of what was aborted, and the same prompt is served right."""
    await pair.settled(a)
    await pair.settled(b)
    await check_relay(a, b, tokens, len(tokens))


async def test_of_nothing_is_done(pair: Pair) -> None:
    async with pair.connect() as (a, _):
        await a.abort("nobody's")
        await a.abort("nobody's")


async def test_with_a_grant_and_no_more(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        tokens, request_id = make_prompt(a.info, 2 * a.info.block_size + 1, "grant"), fresh("grant")
        grant = await b.prep_recv(request_id, len(tokens), tokens)
        await b.abort(request_id)
        await pair.settled(b)
        with pytest.raises(RefusedError) as refused:
            await a.remote_send(fresh("late"), 0, len(tokens), grant, tokens)
        assert refused.value.code == "transfer_failed"
        await still_exact(pair, a, b, tokens)


async def test_while_it_waits_for_kv(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        tokens, request_id = make_prompt(a.info, 2 * a.info.block_size + 1, "waits"), fresh("waits")
        grant = await b.prep_recv(request_id, len(tokens), tokens)
        await b.start_generate(request_id, len(tokens), GREEDY, None, grant=grant)
        await b.abort(request_id)
        await pair.settled(b)
        assert b.streams[request_id].num_messages == 0
        await still_exact(pair, a, b, tokens)


async def test_when_one_of_two_lanes_has_arrived(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        block = a.info.block_size
        tokens, request_id = make_prompt(a.info, 4 * block, "half"), fresh("half")
        middle = splits(a.info, 2 * block)
        grant = await b.prep_recv(request_id, len(tokens), tokens)
        await b.start_generate(request_id, len(tokens), GREEDY, None, grant=grant)
        await a.remote_send(request_id, 0, middle, grant, tokens, lane=0)
        await b.abort(request_id)
        with pytest.raises(RefusedError) as refused:
            await a.remote_send(request_id, middle, len(tokens), grant, None, lane=1)
        assert refused.value.code == "transfer_failed"
        await still_exact(pair, a, b, tokens)


async def test_when_all_has_arrived_and_nobody_has_asked_for_it(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        tokens, request_id = make_prompt(a.info, 2 * a.info.block_size, "arrived"), fresh("arrived")
        grant = await b.prep_recv(request_id, len(tokens), tokens)
        await a.remote_send(request_id, 0, len(tokens), grant, tokens)
        await b.abort(request_id)
        await still_exact(pair, a, b, tokens)


@pytest.mark.sample
@pytest.mark.parametrize("who", ["sender", "receiver", "both"])
async def test_while_it_is_sent(pair: Pair, who: str) -> None:
    """Whatever has been put by then: the send ends with one answer, the stream with none or an error."""
    async with pair.connect() as (a, b):
        length = min(
            40 * a.info.block_size, b.info.num_blocks * b.info.block_size // 3, a.info.max_model_len - 8
        )
        tokens, request_id = make_prompt(a.info, length, f"sent {who}"), fresh("sent")
        grant = await b.prep_recv(request_id, length, tokens)
        stream = await b.start_generate(request_id, length, GREEDY, None, grant=grant)
        before = (await a.stats()).load.progress
        sending = a.begin_send(request_id, 0, length, grant, tokens)
        await until_load(a, lambda load: load.progress > before)
        if who in ("sender", "both"):
            await a.abort(request_id)
        if who in ("receiver", "both"):
            await b.abort(request_id)
        await pair.settled(a)
        if not sending.done():
            await a.until(sending.done)
        failure = sending.exception()
        assert failure is None or getattr(failure, "code", "") == "transfer_failed"
        if who == "sender":
            end = (await b.finished(request_id)).finished
            assert end is not None
            assert end.code == ("" if failure is None else "transfer_failed")
        await pair.settled(b)
        if who != "sender":
            assert stream.num_messages == 0 or failure is None
        await still_exact(pair, a, b, tokens)


async def test_while_a_send_waits_for_its_turn(pair: Pair) -> None:
    """Behind streams that have every place of the batch."""
    async with pair.connect() as (a, b):
        tokens, request_id = make_prompt(a.info, 2 * a.info.block_size, "turn"), fresh("turn")
        names = await crowd(a, (await a.stats()).load.max_num_seqs)
        grant = await b.prep_recv(request_id, len(tokens), tokens)
        sending = a.begin_send(request_id, 0, len(tokens), grant, tokens)
        await a.abort(request_id)
        await b.abort(request_id)
        for name in names:
            await a.abort(name)
        await a.until(sending.done)
        await still_exact(pair, a, b, tokens)


@pytest.mark.sample
async def test_while_a_commit_waits(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        tokens, request_id = make_prompt(a.info, 2 * a.info.block_size, "commit"), fresh("commit")
        grant = await b.prep_recv(request_id, len(tokens), tokens)
        committing = b.begin(lambda call: wire.Commit(call, request_id, grant.grant_id, 60.0))
        await b.abort(request_id)
        await b.until(committing.done)
        failure = committing.exception()
        assert isinstance(failure, RefusedError) and failure.code == "transfer_failed"
        await still_exact(pair, a, b, tokens)


async def test_while_it_generates_nothing_more_comes(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        tokens, request_id = make_prompt(a.info, 5, "generates"), fresh("generates")
        stream = await b.start_generate(request_id, 0, ENDLESS, tokens)
        await b.until(lambda: len(stream.token_ids) > 2)
        await b.abort(request_id)
        seen = stream.num_messages
        await pair.settled(b)
        assert stream.num_messages == seen and stream.finished is None
        await still_exact(pair, a, b, make_prompt(a.info, 9, "generates"))


async def test_while_it_waits_for_a_place(pair: Pair) -> None:
    async with pair.connect() as (_, b):
        names = await crowd(b, (await b.stats()).load.max_num_seqs + 2)
        for name in reversed(names):
            await b.abort(name)
        await pair.settled(b)
        assert all(b.streams[name].finished is None for name in names)


async def crowd(client: WireClient, count: int) -> list[str]:
    """So many streams at once that end by abort alone."""
    count = min(count or 8, 70)
    names = [fresh("crowd") for _ in range(count)]
    for name in names:
        await client.start_generate(name, 0, ENDLESS, make_prompt(client.info, 4, name))
    return names


async def test_the_id_is_free_at_once_and_the_new_request_gets_its_own_tokens(pair: Pair) -> None:
    async with pair.connect() as (_, b):
        request_id = fresh("again")
        await b.start_generate(request_id, 0, ENDLESS, make_prompt(b.info, 6, "old"))
        await b.until(lambda: len(b.streams[request_id].token_ids) > 1)
        await b.abort(request_id)
        b.streams[request_id] = Stream()
        tokens = make_prompt(b.info, 8, "new")
        got = Answer.of(await generate(b, request_id, tokens))
        require_equal(got, await alone(b, fresh("alone"), tokens), b.info)


async def test_after_the_end_is_done(pair: Pair) -> None:
    async with pair.connect() as (_, b):
        request_id = fresh("ended")
        await generate(b, request_id, make_prompt(b.info, 6, "ended"))
        await b.abort(request_id)


# --- a router that dies ------------------------------------------------------------------------------


async def test_a_router_that_falls_silent_leaves_nothing_behind(pair: Pair) -> None:
    """Everything that it had begun, in every phase, ends; and it is told, should it live."""
    async with pair.connect() as (a, b), pair.bus() as bus:
        block = a.info.block_size
        tokens = make_prompt(a.info, 2 * block + 1, "silent")
        mine = [pair.client(bus, engine, router_id=fresh("dying")) for engine in (pair.a, pair.b)]
        for client in mine:
            await client.hello()
        sender, receiver = mine
        await receiver.prep_recv("held", len(tokens), tokens)
        waiting = await receiver.prep_recv("waits", len(tokens), make_prompt(a.info, len(tokens), "other"))
        await receiver.start_generate("waits", len(tokens), GREEDY, None, grant=waiting)
        third = await receiver.prep_recv("commits", len(tokens), make_prompt(a.info, len(tokens), "third"))
        receiver.begin(lambda call: wire.Commit(call, "commits", third.grant_id, 60.0))
        await receiver.start_generate("generates", 0, ENDLESS, make_prompt(a.info, 3, "silent"))
        await sender.start_generate("generates", 0, ENDLESS, make_prompt(a.info, 3, "silent"))
        await until_load(b, lambda load: load.num_grants >= 1 and load.num_running >= 1)
        for client in mine:
            client.rest()
            client.gives_credit = False
        await pair.settled(a)
        await pair.settled(b)
        for client in mine:
            await client.until(lambda: bool(client.told))  # noqa: B023
            assert client.told[0].code == "protocol_violation"


async def test_a_router_that_closes_its_connection_leaves_nothing_behind(pair: Pair) -> None:
    async with pair.connect() as (a, b), pair.bus() as bus:
        tokens = make_prompt(a.info, 2 * a.info.block_size + 1, "closes")
        dying = pair.client(bus, pair.b)
        await dying.hello()
        await dying.prep_recv("held", len(tokens), tokens)
        await dying.start_generate("generates", 0, ENDLESS, make_prompt(a.info, 3, "closes"))
        dying.close()
        await still_exact(pair, a, b, tokens)
