"""Requests with an adapter go to engines that have it, and go on with the revision that began them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest

from microserve.protocol.errors import TransferFailed
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.adapter import Adapter
from microserve.protocol.messages.engine_info import ABILITIES
from microserve.services.links.stream import Tokens
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.authoring.plan import PlanMesh
from microserve.services.router.request.request import Request
from microserve.services.router.strategies import BUILT_IN
from tests.support.router.router_world import (
    World,
    eventually,
    expected_output,
    in_loop,
    router_world,
    serve_with,
)

PROMPT = list(range(100))
SQL, POET = Adapter("sql", "r1"), Adapter("poet", "r2")


def add(world: World, engine_id: str, *adapters: Adapter, **info: Any) -> Any:
    return world.add_engine(engine_id, can=[*ABILITIES], adapters=[*adapters], **info)


@pytest.mark.parametrize("strategy", sorted(each.name for each in BUILT_IN))
@in_loop
async def test_every_strategy_sees_the_engines_that_have_it_and_no_others(strategy: str) -> None:
    async with router_world() as world:
        for name in ("a", "b"):
            add(world, name, SQL)
        for name in ("c", "d"):
            add(world, name, POET)
        world.add_engine("older")
        await world.list_engines()
        for adapter, allowed in (("sql", "ab"), ("poet", "cd")):
            for _ in range(3):
                answer = await world.gateway.generate(PROMPT, strategy=strategy, adapter=adapter)
                assert answer.token_ids == expected_output(4), answer.result
                assert set(answer.result.engines) <= set(allowed)
        named = [
            (engine_id, call.adapter)
            for engine_id, engine in world.engines.items()
            for call in engine.calls
            if isinstance(call, wire.PrepRecv | wire.RemoteSend | wire.StartGenerate)
        ]
        assert named and {each for each in named if each[1] == "sql"} <= {("a", "sql"), ("b", "sql")}
        assert {adapter for _, adapter in named} == {"sql", "poet"}


@in_loop
async def test_one_that_nobody_has_is_refused_at_once() -> None:
    async with router_world() as world:
        a = add(world, "a", SQL)
        await world.list_engines()
        answer = await world.gateway.generate(PROMPT, adapter="poet")
        assert answer.result.code == "no_engines" and "'poet'" in answer.result.detail
        assert not a.calls
        await world.beats(1)
        assert world.gateway.heartbeats[-1].adapters == [SQL]


@in_loop
async def test_the_same_tokens_under_another_adapter_are_another_prefix() -> None:
    seen: list[dict[str, int]] = []

    async def body(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
        seen.append(mesh.prefix(request))
        async for chunk in mesh.pick(None, request).start_generate(request):
            yield chunk

    async with router_world() as world:
        a, b = add(world, "a", SQL, POET), add(world, "b", SQL, POET)
        await world.list_engines()
        a.store(PROMPT)
        b.store(PROMPT[:48], adapter="sql")
        index = world.router.prefixes.index
        await eventually(lambda: index and index.lookup(PROMPT) == {"a": 96}, "events came")
        await eventually(lambda: index and index.lookup(PROMPT, adapter="sql") == {"b": 48}, "events came")
        for adapter in ("", "sql", "poet"):
            await serve_with(world, body, PROMPT, adapter=adapter)
    assert seen == [{"a": 96}, {"b": 48}, {}]


@in_loop
async def test_a_plan_copies_kv_of_an_adapter_among_those_that_have_it() -> None:
    async with router_world() as world:
        add(world, "a", SQL)
        world.add_engine("b")
        await world.list_engines()
        seen: list[tuple[list[str], str]] = []

        async def body(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
            plan = world.router.serving.plans._make_mesh(mesh.state)
            assert isinstance(plan, PlanMesh)
            async with plan.request(PROMPT, adapter="sql") as (inner, own):
                seen.append(([engine.id for engine in inner.engines()], own.adapter))
            yield mesh.pick(None, request).start_generate(request)  # type: ignore[misc]

        await serve_with(world, body, PROMPT)
        assert seen == [(["a"], "sql")]


@pytest.mark.slow
@in_loop
async def test_an_answer_goes_on_with_the_revision_that_began_it_or_not_at_all() -> None:
    async with router_world() as world:
        a = add(world, "a", SQL)
        await world.list_engines()
        a.manual = True
        answer = world.gateway.start(PROMPT, adapter="sql")
        await a.saw(wire.StartGenerate)
        a.emit(wire.Delta(answer.request_id, 0, expected_output(2)))
        await answer.tokens(2)
        b = add(world, "b", Adapter("sql", "another"))
        a.die()
        await world.list_engines(b)
        ended = await answer.wait()
        assert (ended.reason, ended.code) == ("error", "no_engines")
        assert answer.token_ids == expected_output(2) and not b.calls
        assert (await world.gateway.generate(PROMPT, adapter="sql")).token_ids == expected_output(4)


@in_loop
async def test_failover_stays_among_those_that_have_it() -> None:
    async with router_world() as world:
        a, b = add(world, "a", SQL), add(world, "b")
        c = add(world, "c", SQL)
        await world.list_engines()
        a.manual = c.manual = True
        answer = world.gateway.start(PROMPT, adapter="sql")
        await eventually(lambda: a.of(wire.StartGenerate) or c.of(wire.StartGenerate), "it began")
        first, other = (a, c) if a.of(wire.StartGenerate) else (c, a)
        first.emit(wire.Delta(answer.request_id, 0, expected_output(2)))
        await answer.tokens(2)
        other.manual = False
        first.die()
        assert (await answer.wait()).reason == "length"
        assert answer.token_ids == expected_output(4) and not b.calls
        assert other.of(wire.StartGenerate)[-1].adapter == "sql"


@pytest.mark.parametrize(("said", "code"), [("r1", ""), ("", ""), ("another", "no_engines")])
@in_loop
async def test_output_that_another_router_delivered(said: str, code: str) -> None:
    async with router_world() as world:
        add(world, "a", SQL)
        await world.list_engines()
        more: dict[str, Any] = {"output": expected_output(2), "adapter": "sql", "adapter_revision": said}
        answer = await world.gateway.generate(PROMPT, **more)
        assert answer.result.code == code


@in_loop
async def test_an_engine_whose_namesake_is_another_adapter_is_not_taken_up() -> None:
    async with router_world() as world:
        add(world, "a", SQL)
        await world.list_engines()
        b = add(world, "b", Adapter("sql", "another"))
        world.index.set(engine.info for engine in world.engines.values())
        await world.beats(3)
        assert [each.engine_id for each in world.router.registry.joined()] == ["a"]
        assert b.engine_id == "b"


@in_loop
async def test_kv_of_two_revisions_is_refused_before_it_is_asked_for() -> None:
    errors: list[TransferFailed] = []

    async def body(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
        a, b = sorted(mesh.engines(), key=lambda engine: engine.id)
        grant = await b.prep_recv(request)
        assert grant.grant is not None and grant.grant.adapter == SQL
        grant.grant = msgspec.structs.replace(grant.grant, adapter=Adapter("sql", "another"))
        with pytest.raises(TransferFailed) as caught:
            a.remote_send(request, grant)
        errors.append(caught.value)
        await b.release(request, grant)
        async for chunk in a.start_generate(request):
            yield chunk

    async with router_world() as world:
        add(world, "a", SQL)
        add(world, "b", SQL)
        await world.list_engines()
        await serve_with(world, body, PROMPT, adapter="sql")
    assert "adapter: sql@r1 at a, sql@another at b" in errors[0].detail
