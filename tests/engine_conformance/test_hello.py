"""Hello and Welcome: who comes in, who does not, and what is said to frames that no document knows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from microserve.protocol.bus.codec import ENGINE_REQUEST
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.grant import Grant, HeapAddress
from microserve.protocol.messages.numerics import fault_of_numerics
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.types import WIRE_VERSION
from tests.support.engine_conformance.answers import GREEDY, generate, make_prompt
from tests.support.engine_conformance.pair import Pair, is_idle
from tests.support.engine_conformance.wire_client import RefusedError

NO_GRANT = Grant("g", "e", 5, 0, 1, 0, 8, [1], 8, "x", HeapAddress("shm", "h", 1, 2, 3, 5), 1.0)

CALLS: dict[str, Callable[[int], wire.EngineRequest]] = {
    "PrepRecv": lambda call: wire.PrepRecv(call, "r", 1, 9.0),
    "RemoteSend": lambda call: wire.RemoteSend(call, "r", 0, 1, NO_GRANT, 0, 9.0),
    "StartGenerate": lambda call: wire.StartGenerate(call, "r", 0, SamplingParams(), 9.0),
    "Commit": lambda call: wire.Commit(call, "r", "g", 9.0),
    "Abort": lambda call: wire.Abort(call, "r"),
    "Release": lambda call: wire.Release(call, "r", "g"),
    "Stats": wire.Stats,
    "Snapshot": wire.Snapshot,
}


async def test_welcome_says_who_it_is_and_what_it_does(pair: Pair) -> None:
    async with pair.bus() as bus:
        for engine in (pair.a, pair.b):
            client = pair.client(bus, engine)
            welcome = await client.hello()
            info = welcome.info
            assert info.engine_id == engine.name
            assert info.address == engine.address
            assert info.curve_key == engine.server_key
            assert info.wire_version == WIRE_VERSION
            assert 0 < info.incarnation < 1 << 62
            assert min(info.block_size, info.num_blocks, info.num_layers, info.max_model_len) > 0
            assert all(0 <= token < info.vocab_size for token in info.eos_token_ids)
            assert info.model and info.layout_hash and info.revision
            assert not fault_of_numerics(info.numerics) and info.numerics.name
            assert len({info.address, info.events_address, info.replay_address}) == 3
            assert is_idle(welcome.load)
            assert 0 < welcome.load.free_blocks <= info.num_blocks


@pytest.mark.sample
async def test_engines_of_one_model_agree(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        for name in ("model", "revision", "block_size", "layout_hash", "vocab_size", "eos_token_ids"):
            assert getattr(a.info, name) == getattr(b.info, name), name
        assert a.info.numerics == b.info.numerics
        assert a.info.incarnation != b.info.incarnation


@pytest.mark.parametrize("name", CALLS)
async def test_who_has_not_said_hello_is_told_to(pair: Pair, name: str) -> None:
    async with pair.bus() as bus:
        client = pair.client(bus, pair.a)
        with pytest.raises(RefusedError) as refused:
            await client.ask(object, CALLS[name])
        assert refused.value.code == "protocol_violation"


async def test_a_ping_without_hello_is_told_to_say_it(pair: Pair) -> None:
    async with pair.bus() as bus:
        client = pair.client(bus, pair.a)
        client.send(wire.Ping(5))
        await client.until(lambda: bool(client.told))
        assert client.told[0].code == "protocol_violation"


async def test_a_ping_of_another_life_is_refused(pair: Pair) -> None:
    async with pair.connect() as (a, _):
        a.send(wire.Ping(a.incarnation + 1))
        await a.until(lambda: bool(a.told))
        assert a.told[0].code == "protocol_violation"


async def test_hello_again_resets_the_window_and_ends_nothing(pair: Pair) -> None:
    async with pair.connect() as (a, _):
        a.gives_credit = False
        await a.hello(credit=1)
        prompt = make_prompt(a.info, 5, "again")
        stream = await a.start_generate("again", 0, SamplingParams(max_tokens=40, ignore_eos=True), prompt)
        await a.until(lambda: stream.num_messages == 1)
        await a.stats()
        welcome = await a.hello(credit=1_000)
        assert welcome.info == a.info
        await a.finished("again")
        assert len(stream.token_ids) == 40


async def test_a_later_life_of_a_router_ends_what_the_older_one_had_begun(pair: Pair) -> None:
    async with pair.connect() as (a, _), pair.bus() as bus:
        older = pair.client(bus, pair.a, router_id="reborn")
        await older.hello()
        prompt = make_prompt(a.info, 2 * a.info.block_size, "reborn")
        await older.prep_recv("held", len(prompt), prompt)
        assert (await a.stats()).load.num_grants == 1
        later = pair.client(bus, pair.a, router_id="reborn")
        await later.hello()
        await pair.settled(a)
        with pytest.raises(RefusedError) as refused:
            await older.ask(object, wire.Stats)
        assert refused.value.code == "protocol_violation"
        await generate(later, "next", prompt)


async def test_a_router_s_words_count_on_its_own_connection_alone(pair: Pair) -> None:
    """Two routers may use one request id; neither sees the other's."""
    async with pair.connect() as (a, _), pair.bus() as bus:
        other = pair.client(bus, pair.a)
        await other.hello()
        prompt = make_prompt(a.info, 9, "own")
        mine = await a.start_generate("same", 0, SamplingParams(max_tokens=64, ignore_eos=True), prompt)
        await other.abort("same")
        theirs = await generate(other, "same", prompt, GREEDY)
        await a.finished("same")
        assert len(mine.token_ids) == 64 and len(theirs.token_ids) == GREEDY.max_tokens
        assert set(other.streams) == {"same"}


@pytest.mark.parametrize(
    "frames",
    {
        "nothing but a header": lambda good: good[:1],
        "another version": lambda good: [bytes([WIRE_VERSION + 1, good[0][1]]), *good[1:]],
        "another channel": lambda good: [bytes([WIRE_VERSION, 3]), *good[1:]],
        "no msgpack": lambda good: [good[0], b"\xc1\xc1"],
        "an unknown tag": lambda good: [good[0], b"\x92\x7f\x01"],
        "a missing field": lambda good: [good[0], b"\x91\x01"],
        "a field of another type": lambda good: [good[0], b"\x92\x09\xa1x"],
        "seven frames": lambda good: [*good, b"", b"", b"", b"", b""],
    }.items(),
    ids=lambda case: case[0] if isinstance(case, tuple) else str(case),
)
async def test_what_cannot_be_read_is_answered_and_ends_nothing(
    pair: Pair, frames: tuple[str, Callable[[list[bytes]], list[bytes]]]
) -> None:
    async with pair.connect() as (a, _):
        a.send_frames(frames[1](ENGINE_REQUEST.encode(wire.Stats(77))))
        await a.until(lambda: bool(a.told))
        assert a.told[0].code == "protocol_violation"
        await a.stats()


async def test_heartbeats_come_unasked_and_say_which_life_speaks(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        async with asyncio.timeout(30):
            await a.until(lambda: len(a.heartbeats) >= 2)
            await b.until(lambda: len(b.heartbeats) >= 2)
        assert {beat.incarnation for beat in a.heartbeats} == {a.info.incarnation}
        assert {beat.incarnation for beat in b.heartbeats} == {b.info.incarnation}
