"""Requests that wait on purpose: who goes first, what bounds them, and that no free place is given twice."""

from __future__ import annotations

import asyncio

import pytest
import structlog

from microserve.protocol import log
from microserve.protocol.messages import engine as wire
from microserve.services.router.authoring import Chunks, Mesh, Request
from microserve.services.router.authoring.view import StrategyState
from tests.support.router.router_world import (
    World,
    eventually,
    expected_output,
    in_loop,
    router_world,
    serve_with,
    start_with,
)

PROMPT = list(range(50))
STATES: list[StrategyState] = []


def is_free(mesh: Mesh) -> bool:
    return all(mesh.load(engine).sequences < 1 for engine in mesh.engines())


async def one_at_a_time(mesh: Mesh, request: Request) -> Chunks:
    STATES.append(mesh.state)
    rank = float(request.attributes["priority"])
    await mesh.hold(request, lambda: is_free(mesh), rank=rank, most=5, max_s=30.0)
    yield mesh.pick(None, request).start_generate(request)


async def held(number: int) -> None:
    await eventually(lambda: bool(STATES) and len(STATES[-1].held) == number, f"{number} are held")


def started(world: World) -> list[str]:
    return [call.request_id for call in world.engines["a"].of(wire.StartGenerate)]


@in_loop
async def test_the_highest_rank_goes_first_then_the_oldest_and_one_at_a_time() -> None:
    async with router_world("a") as world:
        engine = world.engines["a"]
        engine.manual = True
        name = start_with(world, one_at_a_time)
        answers = [world.gateway.start(PROMPT, strategy=name)]
        await engine.saw(wire.StartGenerate)
        for number, priority in enumerate((0, 5, 0, 5), 1):
            answers.append(world.gateway.start(PROMPT, strategy=name, priority=priority))
            await held(number)
        order = [answers[0], answers[2], answers[4], answers[1], answers[3]]
        for number, answer in enumerate(order, 1):
            await eventually(lambda number=number: len(started(world)) == number, "the next has started")  # type: ignore[misc]
            await world.beats(2)
            assert len(started(world)) == number, "and nobody beside it"
            assert started(world)[-1] == answer.request_id
            engine.finish(answer.request_id, 0, reason="stop")
            await answer.wait()


@in_loop
async def test_more_than_may_wait_are_refused_and_so_is_who_waits_too_long() -> None:
    async def brief(mesh: Mesh, request: Request) -> Chunks:
        await mesh.hold(request, lambda: False, max_s=0.05)
        yield mesh.pick(None, request).start_generate(request)

    async with router_world("a") as world:
        world.engines["a"].manual = True
        name = start_with(world, one_at_a_time)
        first = world.gateway.start(PROMPT, strategy=name)
        await world.engines["a"].saw(wire.StartGenerate)
        answers = []
        for number in range(1, 6):
            answers.append(world.gateway.start(PROMPT, strategy=name))
            await held(number)
        refused = await world.gateway.generate(PROMPT, strategy=name)
        assert refused.ended is not None
        assert (refused.ended.code, refused.ended.detail) == ("queue_full", "5 requests are held already")
        answer = await serve_with(world, brief, PROMPT)
        assert answer.ended is not None
        assert (answer.ended.code, answer.ended.detail) == ("queue_full", "held for 0.05 s")
        # A client that leaves makes room, wherever it stood.
        world.gateway.cancel(answers[2])
        await answers[2].wait()
        await held(4)
        for answer in (first, *answers):
            world.gateway.cancel(answer)
        await held(0)


@in_loop
async def test_a_condition_that_is_met_waits_for_nothing_and_a_mistake_in_one_is_the_authors() -> None:
    async def at_once(mesh: Mesh, request: Request) -> Chunks:
        await mesh.hold(request, lambda: True, most=0)
        yield mesh.pick(None, request).start_generate(request)

    async def wrong(mesh: Mesh, request: Request) -> Chunks:
        await mesh.hold(request, lambda: 1 / 0 > 0)
        yield mesh.pick(None, request).start_generate(request)

    async def no_rank(mesh: Mesh, request: Request) -> Chunks:
        await mesh.hold(request, lambda: True, rank=float("nan"))
        yield mesh.pick(None, request).start_generate(request)

    async with router_world("a") as world:
        for body, is_mistake in ((at_once, False), (wrong, True), (no_rank, True)):
            with structlog.testing.capture_logs() as lines:
                answer = await serve_with(world, body, PROMPT)
            assert answer.token_ids == expected_output(4)
            assert (log.STRATEGY_FAILED in [line["event"] for line in lines]) is is_mistake


@pytest.mark.parametrize("idle_s", [0.2])
def test_who_is_held_is_not_idle(idle_s: float) -> None:
    @in_loop
    async def main() -> None:
        async with router_world("a", strategy_idle_s=idle_s) as world:
            engine = world.engines["a"]
            engine.manual = True
            name = start_with(world, one_at_a_time)
            first = world.gateway.start(PROMPT, strategy=name)
            await engine.saw(wire.StartGenerate)
            second = world.gateway.start(PROMPT, strategy=name)
            await held(1)
            before = asyncio.get_running_loop().time()
            await eventually(lambda: asyncio.get_running_loop().time() > before + 2 * idle_s)
            engine.finish(first.request_id, 0, reason="stop")
            await eventually(lambda: len(started(world)) == 2, "the second has started")
            engine.finish(second.request_id, 0, reason="stop")
            assert (await second.wait()).reason == "stop"

    main()


@in_loop
async def test_an_answer_that_has_begun_is_not_held() -> None:
    async def never(mesh: Mesh, request: Request) -> Chunks:
        await mesh.hold(request, lambda: False)
        yield mesh.pick(None, request).start_generate(request)

    async with router_world("a") as world:
        name = start_with(world, never)
        answer = await world.gateway.generate(PROMPT, strategy=name, output=expected_output(2))
        assert answer.token_ids == expected_output(4)
