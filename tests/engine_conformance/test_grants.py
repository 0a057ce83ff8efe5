"""Grants: what they say, who may use them, how long they live, and that a closed one lets nothing through."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.grant import MAX_LANES, Grant
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.engine_conformance.answers import (
    GREEDY,
    Answer,
    alone,
    generate,
    make_prompt,
    require_equal,
)
from tests.support.engine_conformance.declared import matches
from tests.support.engine_conformance.pair import Pair, until_load
from tests.support.engine_conformance.relay import check_relay, fresh, relay
from tests.support.engine_conformance.wire_client import RefusedError, WireClient, bulk


async def granted(receiver: WireClient, tokens: list[int], end: int = -1) -> tuple[str, Grant]:
    """A grant over all of ``tokens``, or up to ``end``."""
    request_id = fresh("granted")
    return request_id, await receiver.prep_recv(request_id, len(tokens) if end < 0 else end, tokens)


async def refusal_of_send(
    sender: WireClient,
    tokens: list[int],
    grant: Grant,
    *,
    begin: int = 0,
    end: int | None = None,
    lane: int = 0,
) -> RefusedError:
    end = grant.end if end is None else end
    with pytest.raises(RefusedError) as refused:
        await sender.remote_send(fresh("refused"), begin, end, grant, tokens, lane=lane)
    return refused.value


async def test_a_grant_says_where_and_for_how_long(pair: Pair) -> None:
    async with pair.connect() as (_, b):
        tokens = make_prompt(b.info, 2 * b.info.block_size + 1, "says")
        request_id, grant = await granted(b, tokens)
        info = b.info
        assert (grant.engine_id, grant.incarnation) == (info.engine_id, info.incarnation)
        assert (grant.matched, grant.end, len(grant.blocks)) == (0, len(tokens), 3)
        assert (grant.block_size, grant.layout_hash) == (info.block_size, info.layout_hash)
        assert grant.numerics == info.numerics.name
        assert grant.lease_s > 0 and grant.grant_id
        load = (await b.stats()).load
        assert load.num_grants == 1
        assert load.free_blocks <= pair.free_blocks[info.engine_id] - 3
        await b.release(request_id, grant)


async def test_a_second_prep_recv_gets_the_same_grant(pair: Pair) -> None:
    async with pair.connect() as (_, b):
        tokens = make_prompt(b.info, 2 * b.info.block_size, "twice")
        request_id, grant = await granted(b, tokens)
        assert await b.prep_recv(request_id, len(tokens), tokens) == grant
        assert await b.prep_recv(request_id, len(tokens), None) == grant
        assert (await b.stats()).load.num_grants == 1
        with pytest.raises(RefusedError) as refused:
            await b.prep_recv(request_id, len(tokens) - 1, None)
        assert (refused.value.code, refused.value.field) == ("invalid_interval", "end")
        await b.abort(request_id)


@pytest.mark.sample
async def test_a_lease_that_is_over_gives_everything_back(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        tokens = make_prompt(a.info, 2 * a.info.block_size, "lease")
        request_id, grant = await granted(a, tokens)
        assert (await a.stats()).load.num_grants == 1
        await pair.settled(a)
        for build in (
            lambda call: wire.StartGenerate(call, request_id, len(tokens), GREEDY, 9.0, grant.grant_id),
            lambda call: wire.Commit(call, request_id, grant.grant_id, 9.0),
        ):
            with pytest.raises(RefusedError) as refused:
                await a.ask(
                    object, build, *(bulk(tokens) if build(1).__class__ is wire.StartGenerate else [])
                )
            assert refused.value.code == "unknown_request"
        assert (await refusal_of_send(b, tokens, grant)).code == "transfer_failed"
        again = await a.prep_recv(request_id, len(tokens), tokens)
        assert again.grant_id != grant.grant_id
        await a.release(request_id, again)


async def test_who_has_asked_for_the_stream_needs_no_lease(pair: Pair) -> None:
    """A later grant that nobody takes up expires; the earlier one, whose stream waits, does not."""
    async with pair.connect() as (a, b):
        tokens = make_prompt(a.info, a.info.block_size + 1, "waits")
        request_id, grant = await granted(a, tokens)
        await a.start_generate(
            request_id, len(tokens), GREEDY, None, grant=grant, numerics=b.info.numerics.name
        )
        _, later = await granted(a, tokens[:1])
        assert later.lease_s == grant.lease_s
        await until_load(a, lambda load: load.num_grants == 1)
        await b.remote_send(request_id, 0, len(tokens), grant, tokens)
        got = Answer.of(await a.finished(request_id))
        assert got.token_ids == (await alone(b, fresh("alone"), tokens, cached=[len(tokens)])).token_ids


async def test_a_grant_that_is_given_back_is_closed(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        tokens = make_prompt(a.info, 2 * a.info.block_size + 1, "back")
        request_id, grant = await granted(b, tokens)
        await b.release("another", grant)
        assert (await b.stats()).load.num_grants == 1, "another request's word does not count"
        await b.release(request_id, msgspec.structs.replace(grant, grant_id="none"))
        assert (await b.stats()).load.num_grants == 1
        await b.release(request_id, grant)
        await pair.settled(b)
        await b.release(request_id, grant)
        assert (await refusal_of_send(a, tokens, grant)).code == "transfer_failed"


async def test_a_grant_is_its_request_s_alone(pair: Pair) -> None:
    async with pair.connect() as (a, b), pair.bus() as bus:
        tokens = make_prompt(a.info, a.info.block_size, "foreign")
        request_id, grant = await granted(b, tokens)
        other = pair.client(bus, pair.b)
        await other.hello()
        for client, name in ((b, "another"), (other, request_id), (a, request_id)):
            with pytest.raises(RefusedError) as refused:
                await client.start_generate(name, len(tokens), GREEDY, tokens, grant=grant)
            assert refused.value.code == "unknown_request", name
            with pytest.raises(RefusedError) as refused:
                await client.commit(name, grant)
            assert refused.value.code == "unknown_request", name
        await other.abort(request_id)
        await b.start_generate(
            request_id, len(tokens), GREEDY, None, grant=grant, numerics=a.info.numerics.name
        )
        await a.remote_send(request_id, 0, len(tokens), grant, tokens)
        await b.finished(request_id)


async def test_start_generate_twice_is_one_stream(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        tokens = make_prompt(a.info, a.info.block_size + 2, "double")
        request_id, grant = await granted(b, tokens)
        for _ in range(2):
            await b.start_generate(
                *(request_id, len(tokens), GREEDY, None), grant=grant, numerics=a.info.numerics.name
            )
        await a.remote_send(request_id, 0, len(tokens), grant, tokens)
        stream = await b.finished(request_id)
        assert len(stream.token_ids) == GREEDY.max_tokens
        await pair.settled(b)


async def test_a_send_that_is_done_is_answered_the_same_again(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        tokens = make_prompt(a.info, 2 * a.info.block_size, "sent")
        request_id, grant = await granted(b, tokens)
        first = await a.remote_send(request_id, 0, len(tokens), grant, tokens)
        again = await a.remote_send(request_id, 0, len(tokens), grant, None)
        assert msgspec.structs.replace(again, call_id=first.call_id) == first
        assert await b.commit(request_id, grant, numerics=a.info.numerics.name) == len(tokens)


async def test_a_lane_is_one_writer_s(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        tokens = make_prompt(a.info, 2 * a.info.block_size, "lane")
        request_id, grant = await granted(b, tokens)
        await a.remote_send(request_id, 0, len(tokens), grant, tokens)
        assert (await refusal_of_send(a, tokens, grant)).code == "transfer_failed"
        for lane in (-1, MAX_LANES):
            refused = await refusal_of_send(a, tokens, grant, lane=lane)
            assert (refused.code, refused.field) == ("invalid_request", "lane")
        assert await b.commit(request_id, grant, numerics=a.info.numerics.name) == len(tokens)


async def test_a_send_stays_inside_of_its_grant(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        tokens = make_prompt(a.info, 2 * a.info.block_size + 4, "inside")
        request_id, grant = await granted(b, tokens, len(tokens) - 4)
        length, cases = len(tokens), {}
        cases["end behind the grant's"] = (0, length)
        cases["end behind the prompt's"] = (0, length + 1)
        cases["begin behind end"] = (2, 1)
        cases["begin before the prompt"] = (-length - 1, grant.end)
        for name, (begin, end) in cases.items():
            refused = await refusal_of_send(a, tokens, grant, begin=begin, end=end)
            assert refused.code == "invalid_interval" and refused.field in ("begin", "end"), name
        sent = await a.remote_send(request_id, 0, grant.end, grant, tokens)
        assert sent.sent == grant.end
        await b.abort(request_id)


@pytest.mark.sample
async def test_other_geometry_is_refused_before_a_byte_moves(pair: Pair) -> None:
    """And by a refused send neither the lane nor the grant is used up."""
    async with pair.connect() as (a, b):
        tokens = make_prompt(a.info, 2 * a.info.block_size + 3, "geometry")
        request_id, grant = await granted(b, tokens)
        for name, other in {
            "layout_hash": msgspec.structs.replace(grant, layout_hash="0" * len(grant.layout_hash)),
            "block_size": msgspec.structs.replace(grant, block_size=grant.block_size * 2),
        }.items():
            refused = await refusal_of_send(a, tokens, other)
            assert refused.code in ("transfer_failed", "invalid_request"), name
        sent = await a.remote_send(request_id, 0, len(tokens), grant, tokens)
        assert sent.sent == len(tokens)
        await b.start_generate(
            request_id, len(tokens), GREEDY, None, grant=grant, numerics=a.info.numerics.name
        )
        got = Answer.of(await b.finished(request_id))
        require_equal(got, await alone(b, fresh("alone"), tokens, cached=[len(tokens)]), b.info)


async def test_a_grant_that_contradicts_itself_is_refused(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        block = a.info.block_size
        tokens = make_prompt(a.info, 2 * block, "contradicts")
        request_id, grant = await granted(b, tokens)
        heap = grant.heap
        for changes in (
            {"blocks": grant.blocks[:1]},
            {"blocks": [grant.blocks[0]] * 2},
            {"blocks": [grant.blocks[0], 1 << 40]},
            {"blocks": [-1, grant.blocks[1]]},
            {"matched": 1},
            {"matched": -block, "blocks": [*grant.blocks, 0]},
            {"slot": 1 << 40},
            {"slot": -1},
            {"generation": grant.generation + 1},
            {"heap": msgspec.structs.replace(heap, incarnation=heap.incarnation + 2)},
            {"heap": msgspec.structs.replace(heap, incarnation=heap.incarnation + 4, host="elsewhere")},
            {"heap": msgspec.structs.replace(heap, incarnation=heap.incarnation + 6, kind="none")},
            {"heap": msgspec.structs.replace(heap, incarnation=heap.incarnation + 8, nbytes=-1)},
        ):
            refused = await refusal_of_send(a, tokens, msgspec.structs.replace(grant, **changes))
            assert refused.code in ("transfer_failed", "invalid_request", "invalid_interval"), (
                changes,
                refused,
            )
        await a.remote_send(request_id, 0, len(tokens), grant, tokens)
        assert await b.commit(request_id, grant, numerics=a.info.numerics.name) == len(tokens)


async def test_more_than_there_is_room_for_is_refused_at_once(pair: Pair) -> None:
    """For now with a code of capacity, for ever with another; and what was refused has taken nothing."""
    async with pair.connect() as (_, b):
        block, free = b.info.block_size, pair.free_blocks["engine-b"]
        longest = min(b.info.max_model_len - 1, free * block // 4)
        held: list[tuple[str, Grant]] = []
        with pytest.raises(RefusedError) as refused:
            for number in itertools.count():
                assert number <= 5, "five quarters of the pool are granted"
                held.append(await granted(b, make_prompt(b.info, longest, f"room {number}")))
        assert held and refused.value.code in ("grants_full", "cache_full")
        assert refused.value.failed.retry_after_s >= 0
        for request_id, grant in held:
            await b.release(request_id, grant)
        await pair.settled(b)
        request_id, grant = await granted(b, make_prompt(b.info, longest, "room again"))
        await b.release(request_id, grant)
        endless = make_prompt(b.info, max(b.info.max_model_len, b.info.num_blocks * block) + 1, "endless")
        with pytest.raises(RefusedError) as refused:
            await granted(b, endless)
        assert refused.value.code == "prompt_too_long"


# --- Commit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [0, 3])
async def test_commit_makes_whole_blocks_of_prefix_cache(pair: Pair, more: int) -> None:
    async with pair.connect() as (a, b):
        block = a.info.block_size
        tokens, salt = make_prompt(a.info, 2 * block + more, "commit"), fresh("commit")
        request_id = fresh("committed")
        grant = await b.prep_recv(request_id, len(tokens), tokens, salt=salt)
        committing = b.begin(
            lambda call: wire.Commit(call, request_id, grant.grant_id, 60.0, a.info.numerics.name)
        )
        await b.stats()
        assert not committing.done(), "nothing has been sent yet"
        await a.remote_send(request_id, 0, len(tokens), grant, tokens, salt=salt)
        committed, _ = await committing
        assert isinstance(committed, wire.Committed) and committed.num_tokens == 2 * block
        await pair.settled(b)
        hit = await b.prep_recv(request_id, len(tokens), tokens, salt=salt)
        assert hit.matched in matches(b.info, 2 * block, len(tokens))
        await b.release(request_id, hit)
        got = Answer.of(await generate(b, fresh("behind"), tokens, salt=salt))
        require_equal(got, await alone(b, fresh("alone"), tokens, cached=[2 * block]), b.info)
        with pytest.raises(RefusedError) as refused:
            await b.commit(request_id, grant)
        assert refused.value.code == "unknown_request"


async def test_a_commit_whose_time_is_over_fails_and_gives_back(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        tokens = make_prompt(a.info, 2 * a.info.block_size, "late commit")
        request_id, grant = await granted(b, tokens)
        with pytest.raises(RefusedError) as refused:
            await b.commit(request_id, grant, ttl_s=0.05)
        assert refused.value.code == "deadline_exceeded"
        await pair.settled(b)
        assert (await refusal_of_send(a, tokens, grant)).code == "transfer_failed"


async def test_an_exact_engine_keeps_no_kv_of_another_class(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        if not b.info.numerics.is_exact:
            pytest.skip("the engine declares no exact class")
        tokens, salt = make_prompt(a.info, 2 * a.info.block_size, "class"), fresh("class")
        request_id = fresh("mixed")
        grant = await b.prep_recv(request_id, len(tokens), tokens, salt=salt)
        await a.remote_send(request_id, 0, len(tokens), grant, tokens, salt=salt)
        assert await b.commit(request_id, grant, numerics="another") == 0
        relayed = await relay(a, b, tokens, len(tokens), salt=salt)
        assert relayed.grant.matched == 0


@pytest.mark.sample
async def test_a_sender_that_fails_fails_its_receiver_and_nothing_else(pair: Pair) -> None:
    """The send runs out of time in its lane; the stream that waits for it ends with an error, the next one of
    the same prompt does not."""
    async with pair.connect() as (a, b):
        tokens = make_prompt(a.info, 3 * a.info.block_size, "fails")
        request_id, grant = await granted(b, tokens)
        await b.start_generate(
            *(request_id, len(tokens), SamplingParams(max_tokens=3), None),
            grant=grant,
            numerics=a.info.numerics.name,
            ttl_s=0.3,
        )
        stream = await b.finished(request_id)
        assert stream.finished is not None and stream.finished.reason == "error"
        assert stream.finished.code in ("deadline_exceeded", "transfer_failed") and not stream.token_ids
        await pair.settled(b)
        assert (await refusal_of_send(a, tokens, grant)).code == "transfer_failed"
        await check_relay(a, b, tokens, len(tokens))
