"""Strategies that hold the router, or never get on: their clients are served, their versions go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator

import pytest
import structlog

from microserve.protocol import log
from microserve.protocol.messages.strategy.control import ControlEntry, ControlState, StrategyVersion
from microserve.services.links.stream import Tokens
from microserve.services.router.authoring.definition import Strategy
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.authoring.plan import PlanMesh
from microserve.services.router.oversight.overseer import Overseer
from microserve.services.router.request.request import Request
from microserve.services.router.rollout.window import MIN_ERRORS
from tests.support.router.router_world import (
    World,
    eventually,
    expected_output,
    in_loop,
    router_world,
    serve_with,
)

pytestmark = pytest.mark.slow


PROMPT = list(range(50))


HANGS = """
from microserve.services.router.authoring.definition import strategy

@strategy
async def mine(mesh, request):
    while True:
        pass
    yield
"""


@pytest.fixture
def overseer() -> Iterator[Overseer]:
    with Overseer(budget_s=0.03) as overseer:
        yield overseer


async def publish(world: World, source: str, version: int = 1) -> None:
    entry = ControlEntry("mine", StrategyVersion(version, source, "d", {}))
    await eventually(lambda: world.index.last_watch is not None, "the router watches")
    world.index.control(ControlState(version, [entry]))
    await eventually(lambda: world.router.control.version == version, "applied")


def test_a_version_that_hangs_serves_nobody_any_more(overseer: Overseer) -> None:
    @in_loop
    async def main() -> None:
        async with router_world("d", overseer=overseer) as world:
            await publish(world, HANGS)
            with structlog.testing.capture_logs() as logs:
                together = [world.gateway.start(PROMPT, strategy="mine") for _ in range(4)]
                for answer in together:
                    await answer.wait()
                    assert answer.token_ids == expected_output(4)
            hung = [entry for entry in logs if entry["event"] == log.STRATEGY_FAILED]
            assert len(hung) == 1, "the others were not served by it"
            assert "held the router" in hung[0]["error"]
            await eventually(lambda: bool(world.index.acknowledged()[1]), "the index is told")
            [fault] = world.index.acknowledged()[1]
            assert (fault.strategy, fault.version) == ("mine", 1)
            # A state that still has the version (the index was slow) does not bring it back.
            entry = ControlEntry("mine", StrategyVersion(1, HANGS, "d", {}))
            world.index.control(ControlState(2, [entry, ControlEntry("other")]))
            await eventually(lambda: world.router.control.version == 2, "applied")
            assert (await world.gateway.generate(PROMPT, strategy="mine")).token_ids == expected_output(4)

    main()


def test_a_strategy_of_the_routers_own_that_hangs_is_set_aside(overseer: Overseer) -> None:
    async def sleeps(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
        time.sleep(600)  # noqa: ASYNC251
        async for tokens in mesh.pick(None, request).start_generate(request):
            yield tokens

    @in_loop
    async def main() -> None:
        async with router_world("d", overseer=overseer) as world:
            with structlog.testing.capture_logs() as logs:
                answer = await serve_with(world, sleeps, PROMPT)
                assert answer.token_ids == expected_output(4)
                name = answer.result.strategy
                again = await world.gateway.generate(PROMPT, strategy=name)
            assert again.token_ids == expected_output(4)
            hung = [entry["request_id"] for entry in logs if entry["event"] == log.STRATEGY_FAILED]
            assert hung == [answer.request_id], "plain service from now on"

    main()


def test_decisions_over_their_budget_are_told_and_condemn_a_version(overseer: Overseer) -> None:
    slow = HANGS.replace("while True:\n        pass", "import time; time.sleep(0.05)").replace(
        "    yield",
        "    async for tokens in mesh.pick(None, request).start_generate(request):\n        yield tokens",
    )

    @in_loop
    async def main() -> None:
        async with router_world("d", overseer=overseer) as world:
            await publish(world, slow)
            with structlog.testing.capture_logs() as logs:
                for _ in range(MIN_ERRORS):
                    answer = await world.gateway.generate(PROMPT, strategy="mine")
                    assert answer.token_ids == expected_output(4)
            told = [entry for entry in logs if entry["event"] == log.STRATEGY_SLOW]
            assert [entry["strategy_version"] for entry in told] == [1] * MIN_ERRORS
            assert all(entry["held_s"] >= 0.05 for entry in told)
            await eventually(lambda: bool(world.index.acknowledged()[1]), "the index is told")
            assert "held the router" in world.index.acknowledged()[1][0].reason

    main()


def test_a_plan_that_hangs_is_broken_off_and_its_strategy_set_aside(overseer: Overseer) -> None:
    async def plan(mesh: PlanMesh) -> None:
        while True:
            pass

    async def plain(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
        async for tokens in mesh.pick(None, request).start_generate(request):
            yield tokens

    @in_loop
    async def main() -> None:
        async with router_world("d", overseer=overseer) as world:
            world.router.strategies.add(Strategy("planned", plain, {}, {}, "", plan))
            with structlog.testing.capture_logs() as logs:
                answer = await world.gateway.generate(PROMPT, strategy="planned")
                assert answer.token_ids == expected_output(4)
                await eventually(
                    lambda: [e for e in logs if e["event"] == log.PLAN_FAILED], "the plan is broken off"
                )

    main()


async def sleeps_first(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    await asyncio.sleep(600)
    yield Tokens(0, [])


async def spins(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    while True:
        await asyncio.sleep(0)
    yield


async def stops_within(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    async for tokens in mesh.pick(None, request).start_generate(request):
        yield Tokens(tokens.offset, tokens.token_ids[:1])
        await asyncio.Event().wait()


async def forgets_to_start(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    await mesh.pick(None, request).prep_recv(request)
    await asyncio.Event().wait()
    yield Tokens(0, [])


@pytest.mark.parametrize("body", [sleeps_first, spins, stops_within, forgets_to_start])
def test_a_strategy_that_waits_for_no_engine_is_given_up(body: object) -> None:
    @in_loop
    async def main() -> None:
        async with router_world("d", strategy_idle_s=0.1) as world:
            with structlog.testing.capture_logs() as logs:
                answer = await serve_with(world, body, PROMPT)  # type: ignore[arg-type]
            assert answer.token_ids == expected_output(4)
            told = [entry["error"] for entry in logs if entry["event"] == log.STRATEGY_FAILED]
            assert told == ["for 0.1 s it waited for no engine and yielded nothing"]

    main()


@in_loop
async def test_waiting_for_a_slow_engine_is_not_idle() -> None:
    async with router_world("d", strategy_idle_s=0.1) as world:
        engine = world.engines["d"]
        engine.paused.add("decode")

        async def body(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
            async for tokens in mesh.pick(None, request).start_generate(request):
                yield tokens

        asyncio.get_running_loop().call_later(0.35, engine.resume, "decode")
        answer = await serve_with(world, body, PROMPT)
        assert answer.token_ids == expected_output(4)
        assert answer.result.engines == ["d"]


@pytest.mark.parametrize("place", ["deciding", "in its finally"])
def test_a_shadow_that_hangs_decides_no_more(overseer: Overseer, place: str) -> None:
    serve = "async for t in mesh.pick(None, request).start_generate(request):\n            yield t"
    in_finally = f"try:\n        {serve}\n    finally:\n        while True:\n            pass\n"
    shadow = HANGS if place == "deciding" else HANGS[: HANGS.index("    while")] + "    " + in_finally

    @in_loop
    async def main() -> None:
        async with router_world("d", overseer=overseer) as world:
            entry = ControlEntry("mine", shadow=StrategyVersion(1, shadow, "dark", {}), shadow_share=1.0)
            await eventually(lambda: world.index.last_watch is not None, "the router watches")
            world.index.control(ControlState(1, [entry]))
            await eventually(lambda: world.router.control.version == 1, "applied")
            for _ in range(3):
                answer = await world.gateway.generate(PROMPT, strategy="mine")
                assert answer.token_ids == expected_output(4)
            await eventually(lambda: bool(world.index.acknowledged()[1]), "the index is told")
            [fault] = world.index.acknowledged()[1]
            assert "held the router" in fault.reason
            [score] = world.router.control.shadows.scores()
            assert score.num_decisions == score.num_errors == 1, "the others had no shadow"

    main()
