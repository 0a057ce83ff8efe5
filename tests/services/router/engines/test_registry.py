"""Membership: the index names engines, their own connections decide."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import structlog

from microserve.protocol import log
from microserve.protocol.bus.transport import ClientSocket, DisconnectHandler, FramesHandler
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages import index as membership
from tests.support.router.router_world import (
    ScriptedIndex,
    World,
    eventually,
    expected_output,
    in_loop,
    router_world,
)
from tests.support.router.scripted_engine import BLOCK_SIZE

PROMPT = list(range(50))


def joined(world: World) -> dict[str, int]:
    return {c.engine_id: c.info.incarnation for c in world.router.registry.joined()}


async def reopened_index(world: World, address: str) -> ScriptedIndex:
    """ZeroMQ gives an address free a moment after its socket was closed."""
    async with asyncio.timeout(30):
        while True:
            try:
                return ScriptedIndex(world.bus, incarnation=2, address=address)
            except OSError:
                await asyncio.sleep(0.01)


@pytest.mark.slow
@in_loop
async def test_the_death_of_the_index_drops_nobody() -> None:
    async with router_world("a", "b", liveness=20) as world:
        with structlog.testing.capture_logs() as logs:
            world.index.close()
            await eventually(lambda: log.INDEX_LOST in [e["event"] for e in logs], "noticed")
            await world.beats(10)
            assert joined(world) == {"a": 1, "b": 1}
            assert [e["event"] for e in logs].count(log.INDEX_LOST) == 1
        assert (await world.gateway.generate(PROMPT)).token_ids == expected_output(4)


@pytest.mark.slow
@in_loop
async def test_an_index_that_starts_empty_drops_nobody() -> None:
    async with router_world("a", "b") as world:
        address = world.index.address
        world.index.close()
        reborn = await reopened_index(world, address)
        try:
            await eventually(lambda: reborn.watches >= 3, "watched")
            assert joined(world) == {"a": 1, "b": 1}
            assert len(world.router.registry.usable()) == 2
            reborn.set([world.engines["a"].info])  # the first to register again
            await eventually(lambda: reborn.watches >= 6, "watched")
            assert len(world.router.registry.usable()) == 2
            reborn.set([world.engines["a"].info, world.engines["b"].info])
            await eventually(lambda: reborn.watches >= 9, "watched")
            reborn.set([world.engines["a"].info])  # now b has left
            await eventually(lambda: joined(world) == {"a": 1}, "b is gone")
        finally:
            reborn.close()


@in_loop
async def test_an_engine_that_left_serves_out_what_it_has() -> None:
    async with router_world("a", "b") as world:
        world.engines["a"].paused.add("decode")
        world.engines["b"].load = wire.EngineLoad(num_waiting=50)
        await world.beats(3)
        answer = world.gateway.start(PROMPT)
        await world.engines["a"].saw(wire.StartGenerate)
        with structlog.testing.capture_logs() as logs:
            world.index.set([world.engines["b"].info])
            await eventually(lambda: len(world.router.registry.usable()) == 1, "a is leaving")
            assert (await world.gateway.generate(PROMPT)).result.engines == ["b"]
            assert joined(world) == {"a": 1, "b": 1}
            world.engines["a"].resume("decode")
            assert (await answer.wait()).reason == "length"
            await eventually(lambda: joined(world) == {"b": 1}, "a is gone")
            events = [e["event"] for e in logs if e.get("engine_id") == "a"]
            assert log.ENGINE_LEFT in events
            assert log.ENGINE_LOST not in events


@in_loop
async def test_an_engine_that_is_listed_again_stays() -> None:
    async with router_world("a", "b") as world:
        world.engines["a"].paused.add("decode")
        world.engines["b"].load = wire.EngineLoad(num_waiting=50)
        await world.beats(3)
        answer = world.gateway.start(PROMPT)
        await world.engines["a"].saw(wire.StartGenerate)
        world.index.set([world.engines["b"].info])
        await eventually(lambda: len(world.router.registry.usable()) == 1, "a is leaving")
        await world.list_engines()
        world.engines["a"].resume("decode")
        assert (await answer.wait()).reason == "length"
        await world.beats(4)
        assert joined(world) == {"a": 1, "b": 1}
        assert len(world.engines["a"].hellos) == 1


@in_loop
async def test_a_new_life_replaces_the_old_one_at_once() -> None:
    async with router_world("a") as world:
        old = world.engines["a"]
        old.paused.add("decode")
        answer = world.gateway.start(PROMPT)
        await old.saw(wire.StartGenerate)
        young = world.add_engine("a", incarnation=2)
        try:
            await world.list_engines(young)
            ended = await answer.wait()
            assert (ended.reason, ended.code) == ("length", "")
            assert answer.token_ids == expected_output(4)
            assert joined(world) == {"a": 2}
            assert (await world.gateway.generate(PROMPT)).token_ids == expected_output(4)
        finally:
            old.close()


@pytest.mark.slow
@in_loop
async def test_a_lost_engine_comes_back_when_it_answers_again() -> None:
    async with router_world("a", "b", liveness=20) as world:
        world.engines["a"].silent = True
        await eventually(lambda: joined(world) == {"b": 1}, "a is lost")
        for _ in range(3):
            assert (await world.gateway.generate(PROMPT)).result.engines == ["b"]
        world.engines["a"].silent = False
        await eventually(lambda: joined(world) == {"a": 1, "b": 1}, "a is back")


@in_loop
async def test_an_engine_that_was_lost_for_a_message_comes_back_without_the_index() -> None:
    async with router_world("a", "b", liveness=10_000) as world:
        world.index.close()
        await world.beats(3)
        for number in range(2, 5):
            a = world.engines["a"]
            a.lossy.lose_next_down()
            await eventually(lambda a=a, n=number: len(a.hellos) == n, "hello again")  # type: ignore[misc]
            await eventually(lambda: joined(world) == {"a": 1, "b": 1}, "a is back")


@in_loop
async def test_an_engine_that_is_not_listed_any_more_is_not_looked_for() -> None:
    async with router_world("a", "b", liveness=10_000) as world:
        world.index.set([world.engines["b"].info])
        await eventually(lambda: joined(world) == {"b": 1}, "a has left")
        await world.beats(6)
        assert len(world.engines["a"].hellos) == 1


@in_loop
async def test_an_older_list_does_not_undo_a_newer_one() -> None:
    async with router_world("a", "b") as world:
        watcher = next(iter(world.index._watchers))
        stale = membership.Members(world.index.incarnation, world.index.version - 1, [])
        world.index.send(watcher, stale)
        await world.beats(3)
        assert len(world.router.registry.usable()) == 2


@in_loop
async def test_an_engine_that_does_not_fit_the_mesh_is_refused_and_said_once() -> None:
    async with router_world() as world:
        world.add_engine("a", revision="r")
        await world.list_engines()
        with structlog.testing.capture_logs() as logs:
            world.add_engine("b", revision="r", model="another")
            world.add_engine("c", revision="r", layout_hash="another")
            world.add_engine("d", revision="r", block_size=32)
            world.add_engine("f", revision="other weights")
            world.add_engine("e", revision="r")
            world.index.set(engine.info for engine in world.engines.values())
            await eventually(lambda: joined(world) == {"a": 1, "e": 1}, "e joined")
            await world.beats(5)
        refused = {e["engine_id"]: e["error"] for e in logs if e["event"] == log.ENGINE_REFUSED}
        assert len([e for e in logs if e["event"] == log.ENGINE_REFUSED]) == 4
        assert "another model" in refused["b"]
        assert "another layout_hash" in refused["c"]
        assert "another block_size" in refused["d"]
        assert refused["f"] == "engine f has another revision than the mesh: 'other weights', a has 'r'"
        assert world.engines["b"].hellos == []


@in_loop
async def test_an_engine_that_exchanges_no_kv_joins_whatever_its_blocks() -> None:
    async with router_world("a") as world:
        world.add_engine("plain", can=[], block_size=32, layout_hash="another", revision="")
        await world.list_engines()
        assert joined(world) == {"a": 1, "plain": 1}
        served, index = world.router.registry.served, world.router.prefixes.index
        assert served is not None and (served.engine_id, served.block_size) == ("a", BLOCK_SIZE)
        assert index is not None and index.block_size == BLOCK_SIZE


@pytest.mark.parametrize("order", [("old", "new"), ("new", "old")])
@in_loop
async def test_an_engine_of_a_release_that_says_no_revision_serves_beside_one_that_does(
    order: tuple[str, str],
) -> None:
    """What the mesh serves, and whose blocks are looked up, is of those that say more, whoever came first."""
    kinds: dict[str, dict[str, Any]] = {"old": {"layout_hash": "before"}, "new": {"revision": "r"}}
    async with router_world() as world:
        for engine_id in order:
            world.add_engine(engine_id, **kinds[engine_id])
            await world.list_engines()
        assert joined(world) == {"old": 1, "new": 1}
        served, index = world.router.registry.served, world.router.prefixes.index
        assert served is not None and served.engine_id == "new"
        assert index is not None and index.revision == "r"
        assert [engine_id for engine_id, _ in world.router.prefixes.feeds()] == ["new"]
        for strategy in ("data_parallel", "disaggregated", "balanced", "cache_aware", "migrate"):
            for _ in range(4):
                answer = await world.gateway.generate(PROMPT, strategy=strategy)
                assert answer.token_ids == expected_output(4)
        for engine_id, engine in world.engines.items():
            receivers = {send.grant.engine_id for send in engine.of(wire.RemoteSend)}
            assert receivers <= {engine_id}, "no KV goes to the other"


@in_loop
async def test_an_address_that_no_socket_takes_hides_nobody() -> None:
    async with router_world("a") as world:
        bad, connect = world.add_engine("bad"), world.bus.client

        def client(
            address: str,
            handler: FramesHandler,
            *,
            server_key: str = "",
            on_disconnect: DisconnectHandler | None = None,
        ) -> ClientSocket:
            if address == bad.info.address:
                raise OSError("cannot connect")
            return connect(address, handler, server_key=server_key, on_disconnect=on_disconnect)

        world.bus.client = client  # type: ignore[method-assign]
        world.add_engine("z")
        world.index.set(engine.info for engine in world.engines.values())
        await eventually(lambda: joined(world) == {"a": 1, "z": 1}, "z joined")


@in_loop
async def test_a_mesh_may_be_replaced_by_another_model() -> None:
    async with router_world("a") as world:
        world.engines["a"].die()
        await eventually(lambda: joined(world) == {}, "a is lost")
        other = world.add_engine("b", model="another", block_size=32)
        await world.list_engines(other)
        answer = await world.gateway.generate(PROMPT, model="another", strategy="data_parallel")
        assert answer.result.reason == "length"


@in_loop
async def test_a_router_that_stops_takes_up_no_engine() -> None:
    async with router_world("a") as world:
        world.router.registry.stop()
        late = world.add_engine("late")
        world.index.set(engine.info for engine in world.engines.values())
        await world.beats(3)
        assert late.hellos == []
        assert joined(world) == {"a": 1}


@in_loop
async def test_what_is_no_members_message_is_ignored() -> None:
    async with router_world("a") as world:
        watcher = next(iter(world.index._watchers))
        world.index.send(watcher, membership.IndexFailed(0, "internal", "?"))
        world.index.send(watcher, membership.Unknown("a"))
        world.index._socket.send(watcher, [b"junk", b"more"])
        await world.beats(2)
        assert joined(world) == {"a": 1}
