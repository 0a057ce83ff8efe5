"""Other people's engines as members that only publish."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path

import msgspec
import pytest

from microserve.kvcache.prefix.index import PrefixIndex
from microserve.protocol.bus.codec import encode_tokens
from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.index import (
    IndexFailed,
    IndexReport,
    IndexStats,
    Lookup,
    Matches,
    Register,
    Watch,
)
from microserve.protocol.messages.kv.kv_decoding import decode_batch
from microserve.protocol.messages.kv.kv_events import BlockStored, WireBatch
from microserve.services.index.foreign import foreign_engines
from tests.support.index.foreign_engine import ForeignEngine
from tests.support.index.index_service import Index
from tests.support.index.index_world import BLOCK_SIZE, World, in_world, make_info

VLLM_EVENTS = Path(__file__).parents[2] / "data/vllm_events.json.gz"
LINE = "v0 model=org/m events=tcp://10.0.0.7:5557 replay=tcp://10.0.0.7:5558 block_size=16"


def test_a_line_says_all_that_there_is_to_say() -> None:
    [info] = foreign_engines([LINE], 7)
    assert (info.engine_id, info.incarnation, info.model, info.block_size) == ("v0", 7, "org/m", 16)
    assert (info.events_address, info.replay_address) == ("tcp://10.0.0.7:5557", "tcp://10.0.0.7:5558")
    assert info.only_publishes and not info.exchanges_kv and info.can == []
    [second] = foreign_engines([f"{LINE} rank=3"], 7)
    assert (second.events_address, second.replay_address) == ("tcp://10.0.0.7:5560", "tcp://10.0.0.7:5561")
    [blind] = foreign_engines(["v0 model=m events=ipc:///run/v block_size=1"], 7)
    assert (blind.events_address, blind.replay_address) == ("ipc:///run/v", "")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("", "begins with the engine's id"),
        ("model=m events=tcp://a:1 block_size=1", "begins with the engine's id"),
        ("v0 events=tcp://a:1 block_size=1", "model= is missing"),
        ("v0 model=m block_size=1", "events= is missing"),
        ("v0 model=m events=tcp://a:1", "block_size= is missing"),
        ("v0 model=m events=tcp://a:1 block_size=0", "a number from 1 to"),
        ("v0 model=m events=tcp://a:1 block_size=x", "a number from 1 to"),
        ("v0 model=m events=a:1 block_size=1", "events is tcp://HOST:PORT"),
        ("v0 model=m events=tcp://a:0 block_size=1", "events is tcp://HOST:PORT"),
        ("v0 model=m events=tcp://a:65535 block_size=1 rank=1", "no port 1 higher"),
        ("v0 model=m model=n events=tcp://a:1 block_size=1", "'model=n' is none of"),
        ("v0 colour=red model=m events=tcp://a:1 block_size=1", "'colour=red' is none of"),
    ],
)
def test_a_line_that_is_wrong_is_quoted(line: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        foreign_engines([line], 1)
    assert caught.value.field == "index.foreign"


def test_no_engine_is_named_twice() -> None:
    with pytest.raises(ConfigError, match="names v0 twice"):
        foreign_engines([LINE, LINE], 1)


def test_a_foreign_engine_is_a_member_beside_ours_with_blocks_of_its_own() -> None:
    async def test(world: World) -> None:
        foreign = ForeignEngine(world.bus)
        world.at_end(foreign.close)
        tokens = list(range(2 * BLOCK_SIZE * 2))
        event = BlockStored([1, 2], None, tokens, 2 * BLOCK_SIZE, medium="GPU")
        foreign.publish(msgspec.msgpack.encode(WireBatch(1.0, [event], 0)))
        index = await Index(world, foreign=[foreign.line("v0", "m", 2 * BLOCK_SIZE)]).ready()
        try:
            peer = index.peer()
            ours = world.engine()
            ours.compute(tokens[: 3 * BLOCK_SIZE])
            peer.send(Register(1, ours.info))
            peer.send(Watch("test"))
            await world.until(lambda: peer.sees("e1", "v0"))
            matched: dict[str, int] = {}
            while matched != {"e1": 3 * BLOCK_SIZE, "v0": len(tokens)}:
                matched = (await peer.ask(Matches, Lookup(2), encode_tokens(tokens))).matched
            [member] = [each for each in peer.latest().members if each.info.engine_id == "v0"]
            assert (member.info.address, member.info.backend) == ("", "events")

            failed = await peer.ask(IndexFailed, Register(3, make_info("v0")))
            assert (failed.code, failed.field) == ("invalid_request", "engine_id")
        finally:
            await index.stop()

    in_world(test)


def test_a_stock_vllm_is_followed_as_it_was_recorded() -> None:
    """Half of it before anybody listens, the rest live, and of that every third batch is lost. What the whole
    stream says is held against vLLM itself in tests/kvcache/prefix/test_vllm_stream.py."""
    recorded = json.loads(gzip.decompress(VLLM_EVENTS.read_bytes()))
    size, payloads = recorded["block_size"], [bytes.fromhex(each) for each in recorded["batches"]]
    truth = PrefixIndex(size, "m", 1 << 24)
    for payload in payloads:
        truth.apply("v0", decode_batch(payload).events)

    async def test(world: World) -> None:
        foreign = ForeignEngine(world.bus)
        world.at_end(foreign.close)
        half = len(payloads) // 2
        for payload in payloads[:half]:
            foreign.publish(payload)
        index = await Index(world, foreign=[foreign.line("v0", "m", size)]).ready()
        try:
            peer = index.peer()
            await world.until(lambda: foreign.num_replays > 0)
            for number, payload in enumerate(payloads[half:]):
                foreign.publish(payload, is_lost=number % 3 == 0)
                await asyncio.sleep(0)
            expected = [truth.lookup(each["tokens"], each["salt"]) for each in recorded["requests"]]
            found: list[dict[str, int]] = []
            async with asyncio.timeout(60):
                while found != expected:
                    questions = [(each["tokens"], each["salt"]) for each in recorded["requests"]]
                    found = [
                        (await peer.ask(Matches, Lookup(2, salt), encode_tokens(tokens))).matched
                        for tokens, salt in questions
                    ]
            report = await peer.ask(IndexReport, IndexStats(1))
            assert report.num_blocks == truth.num_blocks
        finally:
            await index.stop()

    in_world(test)


def test_a_foreign_engine_stays_though_it_says_nothing() -> None:
    async def test(world: World) -> None:
        index = await Index(world, liveness=3, foreign=[LINE]).ready()
        try:
            peer = index.peer()
            for _ in range(20):
                peer.send(Watch("test"))
                seen = len(peer.replies)
                await world.until(lambda seen=seen: len(peer.replies) > seen)  # type: ignore[misc]
            await world.until(lambda: peer.sees("v0"))
        finally:
            await index.stop()

    in_world(test)
