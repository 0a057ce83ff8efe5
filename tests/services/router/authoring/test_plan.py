"""What a strategy keeps between requests: state of its own, and a plan that outlives its failures."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from itertools import pairwise
from typing import Any

import pytest
import structlog

from microserve.protocol import log
from microserve.protocol.errors import DeadlineExceeded, StrategyError
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.strategy.control import ControlEntry, ControlState, StrategyVersion
from microserve.services.links.stream import Tokens
from microserve.services.router.authoring import plan as plan_module
from microserve.services.router.authoring.definition import PlanFunction, Strategy, strategy
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.authoring.plan import PlanMesh, Plans
from microserve.services.router.authoring.view import MeshView, StrategyState
from microserve.services.router.engines.load import LoadBook
from microserve.services.router.request.request import Request
from microserve.services.simulation.loop import VirtualLoop
from tests.support.router.router_world import World, eventually, in_loop, router_world

PROMPT = list(range(50))


def no_request(*_: object) -> AbstractAsyncContextManager[tuple[Mesh, Request]]:
    raise AssertionError("this plan makes no request")


def counting(name: str, plan: PlanFunction | None = None) -> Strategy:
    """Counts its requests; a new strategy at each call."""

    @strategy(plan=plan)
    async def count(mesh: Mesh, request: Request, *, step: int = 1) -> AsyncGenerator[Tokens, None]:
        mesh.state["requests"] = mesh.state.get("requests", 0) + step
        async for tokens in mesh.pick(None, request).start_generate(request):
            yield tokens

    return Strategy(name, count.function, count.types, count.values, "", plan)


async def serve(world: World, item: Strategy, times: int = 1) -> dict[str, Any]:
    """The strategy's state afterwards."""
    if item.name not in world.router.strategies.names:
        world.router.strategies.add(item)
    for _ in range(times):
        answer = await world.gateway.generate(PROMPT, strategy=item.name)
        assert answer.result.reason == "length", answer.result
    return world.router.serving.plans.use(item)


@in_loop
async def test_state_lives_from_request_to_request_and_is_each_strategys_own() -> None:
    async with router_world("a", "b") as world:
        one, two = counting("one"), counting("two")
        assert (await serve(world, one, 3)) == {"requests": 3}
        assert (await serve(world, two, 2)) == {"requests": 2}
        world.router.strategies.configure({"one": {"step": 10}})  # another value, the same strategy
        assert (await serve(world, one, 1)) == {"requests": 13}
        world.router.serving.plans.drop(one)
        # A request that began with it is served to its end, and leaves nothing behind.
        assert (await serve(world, one, 2)) == {}
        assert (await serve(world, counting("three"), 1)) == {"requests": 1}


@in_loop
async def test_state_is_each_routers_own() -> None:
    item = counting("one")
    for _ in range(2):
        async with router_world("a") as world:
            assert (await serve(world, item)) == {"requests": 1}


@in_loop
async def test_a_plan_begins_with_the_first_request_and_ends_with_its_strategy() -> None:
    seen: list[tuple[int, set[str]]] = []
    began, ended = asyncio.Event(), asyncio.Event()

    async def watch(mesh: PlanMesh, *, step: int) -> None:
        try:
            began.set()
            while True:
                engines = {engine.id for engine in mesh.engines()}
                assert all(mesh.load(engine).sequences >= 0 for engine in mesh.engines())
                seen.append((step * mesh.state["requests"], engines))
                await asyncio.sleep(0.01)
        finally:
            ended.set()

    async with router_world("a", "b") as world:
        item = counting("one", watch)
        await world.gateway.generate(PROMPT)  # of another strategy
        assert not began.is_set()
        await serve(world, item, 2)
        await eventually(lambda: seen[-1] == (2, {"a", "b"}), "the plan sees the state and the mesh")
        world.router.serving.plans.drop(item)
        await asyncio.wait_for(ended.wait(), 10)
        world.router.serving.plans.drop(item)  # an unknown one is fine


@in_loop
async def test_parameters_that_change_reach_the_plan_that_runs_and_its_state_stays() -> None:
    begun: list[int] = []

    async def watch(mesh: PlanMesh, *, step: int) -> None:
        begun.append(step)
        await asyncio.Event().wait()

    async with router_world("a") as world:
        world.router.strategies.add(counting("one", watch))
        await eventually(lambda: world.index.last_watch is not None, "the router watches")
        await world.gateway.generate(PROMPT, strategy="one")
        for version, entries in enumerate(
            ([ControlEntry("one", StrategyVersion(1, "", "", {"step": 5}))], [], [ControlEntry("other")]), 1
        ):
            world.index.control(ControlState(version, entries))
            await eventually(lambda v=version: world.router.control.version == v, "applied")  # type: ignore[misc]
        await eventually(lambda: begun == [1, 5, 1], "the plan follows, and nothing else stirs it")
        await world.gateway.generate(PROMPT, strategy="one")
        [state] = [kept.state for kept in world.router.serving.plans._kept.values() if kept.plan]
        assert state == {"requests": 2}


@in_loop
async def test_a_plan_that_wants_to_end_the_router_does_not() -> None:
    async def leave(mesh: PlanMesh) -> None:
        raise SystemExit(3)

    async with router_world("a") as world:
        with structlog.testing.capture_logs() as logs:
            await serve(world, counting("one", leave))
            await eventually(lambda: [e for e in logs if e["event"] == log.PLAN_FAILED], "told")
        assert (await world.gateway.generate(PROMPT)).result.reason == "length"


@in_loop
async def test_a_plan_ends_with_its_router() -> None:
    ended = asyncio.Event()

    async def wait(mesh: PlanMesh) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with router_world("a") as world:
        await serve(world, counting("one", wait))
    assert ended.is_set()


@in_loop
async def test_a_plan_that_raises_is_told_of_and_begins_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan_module, "MIN_PAUSE_S", 0.001)
    runs: list[int] = []
    well = asyncio.Event()

    async def fail(mesh: PlanMesh) -> None:
        runs.append(len(runs))
        if len(runs) <= 3:
            raise [ValueError("mine"), DeadlineExceeded("the mesh's"), StrategyError("mine")][len(runs) - 1]
        well.set()

    async with router_world("a") as world:
        with structlog.testing.capture_logs() as logs:
            await serve(world, counting("one", fail))
            await asyncio.wait_for(well.wait(), 10)
            await serve(world, world.router.strategies.get("one"))
        failures = [entry for entry in logs if entry["event"] == log.PLAN_FAILED]
        assert [entry["log_level"] for entry in failures] == ["error", "warning", "error"]
        assert {entry["strategy"] for entry in failures} == {"one"}
        assert len(runs) == 4, "a plan that returns has ended"


def test_the_pause_doubles_up_to_its_limit_and_a_plan_that_ran_well_starts_afresh() -> None:
    """In virtual time; the plan runs for 50 s before its seventh failure and its twelfth."""
    begun: list[float] = []

    async def fail(mesh: PlanMesh) -> None:
        begun.append(asyncio.get_running_loop().time())
        if len(begun) in (7, 12):
            await asyncio.sleep(50.0)
        if len(begun) < 25:
            raise ValueError

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            plans = Plans(
                tasks,
                lambda state: PlanMesh(list, LoadBook(), random.Random(), state, no_request),
                run=Strategy.start_plan,
                tell_end=Strategy.tell_end,
            )
            plans.use(counting("one", fail))

    with structlog.testing.capture_logs():
        VirtualLoop().run(main())
    pauses = [round(later - earlier, 6) for earlier, later in pairwise(begun)]
    rising = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2]
    assert pauses[:6] == rising
    assert pauses[6:12] == [50.1, *rising[1:5], 50.1]
    assert pauses[12:] == [*rising[1:], 6.4, 12.8, 25.6, 30.0, 30.0, 30.0, 30.0]


@in_loop
async def test_a_plan_moves_kv_by_a_request_of_its_own_and_leaves_nothing() -> None:
    moved = asyncio.Event()

    async def move(mesh: PlanMesh) -> None:
        async with mesh.request(PROMPT, salt="t") as (inner, request):
            assert inner.state is mesh.state
            a, b = sorted(inner.engines(), key=lambda engine: engine.id)
            grant = await b.prep_recv(request, end=request.num_block_tokens)
            a.remote_send(request, grant, end=grant.end)
            assert await b.commit(request, grant) == 48
            unused = await a.prep_recv(request)
            assert unused.grant_id
        with pytest.raises(StrategyError, match="has ended"):
            await a.prep_recv(request)
        moved.set()

    async with router_world("a", "b") as world:
        await serve(world, counting("one", move))
        await asyncio.wait_for(moved.wait(), 10)
        a, b = world.engines["a"], world.engines["b"]
        assert [(call.begin, call.end, call.salt) for call in a.of(wire.RemoteSend)] == [(0, 48, "t")]
        assert len(b.of(wire.Commit)) == 1
        assert len(world.router.serving) == 0, "it counts as nobody's request"


@in_loop
async def test_a_plans_request_has_its_time() -> None:
    errors: list[Exception] = []
    over = asyncio.Event()

    async def wait(mesh: PlanMesh) -> None:
        for raised in (None, TimeoutError("my own")):
            try:
                async with mesh.request(PROMPT, ttl_s=0.05) as (inner, request):
                    await inner.pick(None, request).prep_recv(request)
                    if raised is not None:
                        raise raised
                    await asyncio.Event().wait()
            except (DeadlineExceeded, TimeoutError) as error:
                errors.append(error)
        over.set()

    async with router_world("a") as world:
        await serve(world, counting("one", wait))
        await asyncio.wait_for(over.wait(), 10)
    assert [type(error) for error in errors] == [DeadlineExceeded, TimeoutError]


@in_loop
async def test_without_engines_a_plan_reads_an_empty_mesh() -> None:
    async with router_world("a") as world:
        item = counting("one")
        await serve(world, item)
        world.engines["a"].die()
        await eventually(lambda: not world.router.registry.joined(), "a is lost")
        serving = world.router.serving
        view = MeshView(world.router.registry.usable, serving.book, serving._rng, StrategyState())
        assert list(view.engines("prefill")) == []


async def takes_nothing() -> None: ...


async def takes_other(mesh: PlanMesh, *, ratio: float) -> None: ...


async def takes_positional(mesh: PlanMesh, step: int) -> None: ...


async def yields(mesh: PlanMesh) -> AsyncGenerator[int, None]:
    yield 1


def is_plain(mesh: PlanMesh) -> None: ...


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (takes_nothing, "must take"),
        (takes_other, "ratio is no parameter"),
        (takes_positional, "step is no parameter"),
        (yields, "without 'yield'"),
        (is_plain, "'async def'"),
    ],
)
def test_a_plan_of_the_wrong_shape(plan: Any, text: str) -> None:
    with pytest.raises(StrategyError, match=text):
        counting("one", plan)
