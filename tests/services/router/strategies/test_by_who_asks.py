"""The strategies that go by who asks, wait on purpose, or use more engines than one request needs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.engine import EngineLoad
from tests.support.router.router_world import World, eventually, expected_output, in_loop, router_world

PROMPT = list(range(100))


async def report(world: World, engine_id: str, **fields: Any) -> None:
    """Let the router hear this of an engine."""
    world.engines[engine_id].load = load = EngineLoad(**fields)
    [connection] = [c for c in world.router.registry.joined() if c.engine_id == engine_id]
    await eventually(lambda: connection.load == load, "heartbeat")


async def engine_of(world: World, strategy: str, **fields: Any) -> str:
    answer = await world.gateway.generate(PROMPT, strategy=strategy, **fields)
    assert answer.token_ids == expected_output(4), answer.result
    [engine] = answer.result.engines
    return engine


# --- sticky ----------------------------------------------------------------------------------------


@in_loop
async def test_sticky_keeps_a_session_until_its_engine_has_too_much() -> None:
    users = [f"user-{number}" for number in range(30)]
    async with router_world("a", "b", "c") as world:
        homes = {user: await engine_of(world, "sticky", attributes={"user": user}) for user in users}
        assert len(set(homes.values())) == 3
        for user in users:
            assert await engine_of(world, "sticky", attributes={"user": user}) == homes[user]
        await report(world, "a", num_running=20)
        moved = {user: await engine_of(world, "sticky", attributes={"user": user}) for user in users}
        assert {user for user in users if moved[user] != homes[user]} == {
            user for user in users if homes[user] == "a"
        }
        assert await engine_of(world, "sticky") in ("b", "c"), "who has no session goes where least is done"


@in_loop
async def test_sticky_moves_no_session_but_those_of_an_engine_that_left() -> None:
    users = [f"user-{number}" for number in range(30)]
    async with router_world("a", "b", "c", strategies={"sticky": {"by": "header.x-session"}}) as world:
        ask = [{"header.x-session": user, "user": "all the same"} for user in users]
        homes = [await engine_of(world, "sticky", attributes=each) for each in ask]
        assert len(set(homes)) == 3
        await world.list_engines(world.engines["b"], world.engines["c"])
        await eventually(lambda: len(world.router.registry.usable()) == 2, "a is gone")
        for before, each in zip(homes, ask, strict=True):
            after = await engine_of(world, "sticky", attributes=each)
            assert after == before if before != "a" else after in ("b", "c")


# --- hedged ----------------------------------------------------------------------------------------


@in_loop
async def test_hedged_asks_a_second_engine_when_the_first_is_silent() -> None:
    async with router_world("a", "b", strategies={"hedged": {"after_s": 0.05}}) as world:
        await report(world, "b", num_running=1)
        assert await engine_of(world, "hedged") == "a"
        world.engines["a"].manual = True
        answer = await world.gateway.generate(PROMPT, strategy="hedged")
        assert answer.token_ids == expected_output(4)
        assert answer.result.engines == ["a", "b"]
        await world.engines["a"].saw(wire.Abort)


# --- priority --------------------------------------------------------------------------------------


@in_loop
async def test_priority_lets_the_important_go_first() -> None:
    async with router_world("a", strategies={"priority": {"places": 1, "most": 3, "max_s": 20.0}}) as world:
        engine = world.engines["a"]
        engine.manual = True

        def ask(priority: int) -> Any:
            return world.gateway.start(PROMPT, strategy="priority", priority=priority)

        def running() -> list[str]:
            return [call.request_id for call in engine.of(wire.StartGenerate)]

        state = world.router.serving.plans.use(world.router.strategies.get("priority"))
        answers = [ask(0)]
        await engine.saw(wire.StartGenerate)
        for number, priority in enumerate((-1, 0, 7), 1):
            answers.append(ask(priority))
            await eventually(lambda number=number: len(state.held) == number, "held")  # type: ignore[misc]
        refused = await world.gateway.generate(PROMPT, strategy="priority", priority=9)
        assert refused.result.code == "queue_full"
        for number, place in enumerate((0, 3, 2, 1), 1):
            await eventually(lambda number=number: len(running()) == number, "the next runs")  # type: ignore[misc]
            assert running()[-1] == answers[place].request_id
            engine.finish(answers[place].request_id, 0, reason="stop")
            await answers[place].wait()


# --- tenant_share ----------------------------------------------------------------------------------


@in_loop
async def test_tenant_share_keeps_places_for_others_whatever_one_asks_for() -> None:
    share = {"share": 0.5, "places": 4, "most": 100}
    async with router_world("a", "b", strategies={"tenant_share": share}) as world:
        for engine in world.engines.values():
            engine.manual = True
        state = world.router.serving.plans.use(world.router.strategies.get("tenant_share"))

        def running() -> Counter[str]:
            return Counter(state.get("running", {}))

        flood = [
            world.gateway.start(PROMPT, strategy="tenant_share", attributes={"x": "1"}, tenant="a")
            for _ in range(10)
        ]
        await eventually(lambda: len(state.held) == 6, "six of ten wait")
        assert running() == {"a": 4}
        other = world.gateway.start(PROMPT, strategy="tenant_share", tenant="b")
        await eventually(lambda: running() == {"a": 4, "b": 1}, "the other does not wait behind them")
        for answer in (*flood, other):
            world.gateway.cancel(answer)
        for answer in (*flood, other):
            await answer.wait()
        await eventually(lambda: not running() and not len(state.held), "nothing is left")


# --- thirds ----------------------------------------------------------------------------------------


def sends(world: World, target: str) -> list[tuple[str, int, int]]:
    """Engine, begin and end of those into one engine."""
    return sorted(
        (engine.engine_id, call.begin, call.end)
        for engine in world.engines.values()
        for call in engine.of(wire.RemoteSend)
        if call.grant.engine_id == target
    )


@pytest.mark.parametrize(
    ("num_tokens", "parts", "matched", "expected"),
    [
        (100, 3, 0, [("p", 0, 32), ("q", 32, 64)]),
        (100, 3, 48, [("q", 48, 64)]),
        (100, 2, 0, [("p", 0, 48)]),
        (20, 3, 0, []),
        (100, 8, 0, [("p", 0, 32), ("q", 32, 64)]),
    ],
)
def test_thirds_computes_each_part_once_and_brings_all_of_it_together(
    num_tokens: int, parts: int, matched: int, expected: list[tuple[str, int, int]]
) -> None:
    @in_loop
    async def main() -> None:
        labels = {"d": ["decode"], "p": ["prefill"], "q": ["prefill"]}
        chosen = {"thirds": {"parts": parts, "least": 16}}
        async with router_world("d", "p", "q", labels=labels, strategies=chosen) as world:
            await report(world, "q", num_running=1)  # so that p comes first
            world.engines["d"].matched = matched
            answer = await world.gateway.generate(PROMPT[:num_tokens], strategy="thirds")
            assert answer.token_ids == expected_output(4), answer.result
            assert sends(world, "d") == expected
            # What the second part builds on is copied to where that is computed.
            assert sends(world, "q") == ([("p", 0, 32)] if len(sends(world, "d")) == 2 or matched else [])

    main()


@in_loop
async def test_thirds_on_one_engine_is_plain_service() -> None:
    async with router_world("a", strategies={"thirds": {"least": 16}}) as world:
        assert await engine_of(world, "thirds") == "a"
        assert world.calls() == [("a", "StartGenerate")]
