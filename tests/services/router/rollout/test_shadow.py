"""Shadow versions: they decide, nothing is done, and what they would have done is scored."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
import structlog

from microserve.protocol import log
from microserve.protocol.messages.engine import EngineLoad
from microserve.protocol.messages.strategy.control import (
    ControlEntry,
    ControlState,
    ShadowScore,
    StrategyVersion,
)
from microserve.services.router.rollout.book import Published, StrategyBook
from microserve.services.router.strategies import BUILT_IN
from microserve.services.router.strategies.placing.data_parallel import data_parallel
from tests.support.router.router_world import World, eventually, expected_output, in_loop, router_world

PROMPT = list(range(50))
LABELS = {"d": ["decode"], "p": ["prefill"]}
HEAD = """
from microserve.services.router.authoring import strategy

@strategy
async def mine(mesh, request, *, label: str = "decode"):
"""
PLAIN = HEAD + "    async for t in mesh.pick(label, request).start_generate(request):\n        yield t\n"
ELSEWHERE = PLAIN.replace('"decode"', '"prefill"')
SPLIT = (
    HEAD
    + """
    decode, prefill = mesh.pick("decode", request), mesh.pick("prefill", request)
    grant = await decode.prep_recv(request)
    prefill.remote_send(request, grant)
    async for tokens in decode.start_generate(request, begin=request.num_tokens, grant=grant):
        yield tokens
"""
)


def version(number: int, source: str) -> StrategyVersion:
    return StrategyVersion(number, source, f"d{number}", {})


async def publish(world: World, shadow: str, share: float = 1.0) -> None:
    entry = ControlEntry("mine", version(1, PLAIN), shadow=version(2, shadow), shadow_share=share)
    await eventually(lambda: world.index.last_watch is not None, "the router watches")
    world.index.control(ControlState(2, [entry]))
    await eventually(lambda: world.router.control.version == 2, "applied")


async def serve(world: World, count: int) -> None:
    for _ in range(count):
        answer = await world.gateway.generate(PROMPT, strategy="mine")
        assert answer.token_ids == expected_output(4)
        assert answer.result.strategy_version == 1


def score(world: World) -> ShadowScore:
    [found] = world.router.control.shadows.scores()
    return found


@in_loop
async def test_it_is_scored_and_no_engine_hears_of_it() -> None:
    async with router_world("d", "p", labels=LABELS) as world:
        for engine in world.engines.values():
            engine.load = msgspec.structs.replace(EngineLoad(), prefill_tokens_per_s=100.0, free_blocks=9)
        await world.beats(3)
        await publish(world, SPLIT)
        await serve(world, 3)
        await eventually(lambda: score(world).num_decisions == 3, "scored")
        found = score(world)
        assert (found.strategy, found.version) == ("mine", 2)
        assert (found.num_errors, found.num_agreed) == (0, 3)
        assert (found.computed_tokens, found.served_computed_tokens) == (50.0, 50.0)
        assert (found.sent_tokens, found.served_sent_tokens) == (50.0, 0.0)
        assert found.ttft_s > 0.0
        assert found.served_ttft_s > 0.0
        assert world.calls() == [("d", "StartGenerate")] * 3
        await eventually(
            lambda: world.index.last_watch is not None and world.index.last_watch.shadows == [found],
            "the index is told",
        )


@in_loop
async def test_it_knows_what_engines_hold_and_says_where_it_differs() -> None:
    async with router_world("d", "p", labels=LABELS) as world:
        world.engines["p"].store(PROMPT)
        index = world.router.prefixes.index
        await eventually(lambda: index and index.lookup(PROMPT) == {"p": 48}, "events came")
        await publish(world, ELSEWHERE)
        await serve(world, 1)
        await eventually(lambda: score(world).num_decisions == 1, "scored")
        found = score(world)
        assert found.num_agreed == 0
        assert (found.computed_tokens, found.served_computed_tokens) == (2.0, 50.0)


@in_loop
async def test_its_mistakes_are_counted_and_too_many_are_a_fault() -> None:
    async with router_world("d", "p", labels=LABELS) as world:
        await publish(world, HEAD + "    raise ValueError('boo')\n    yield\n")
        with structlog.testing.capture_logs() as logs:
            await serve(world, 4)
            await eventually(lambda: bool(world.index.acknowledged()[1]), "the index is told")
        [fault] = world.index.acknowledged()[1]
        assert (fault.strategy, fault.version) == ("mine", 2)
        failed = [entry for entry in logs if entry["event"] == log.SHADOW_FAILED]
        assert {entry["error"] for entry in failed} == {"boo"}
        assert not [entry for entry in logs if entry["event"] == log.STRATEGY_FAILED]
        assert score(world).num_errors == score(world).num_decisions == 4


@in_loop
async def test_misuse_is_found_by_the_same_checks_as_in_service() -> None:
    async with router_world("d", "p", labels=LABELS) as world:
        await publish(world, SPLIT.replace("prep_recv(request)", "prep_recv(request, end=20)"))
        with structlog.testing.capture_logs() as logs:
            await serve(world, 1)
            await eventually(lambda: score(world).num_errors == 1, "counted")
        [failed] = [entry for entry in logs if entry["event"] == log.SHADOW_FAILED]
        assert "is not inside the grant's [0, 20)" in failed["error"]


@in_loop
async def test_its_plan_acts_on_nothing_and_ends_with_it() -> None:
    planned = PLAIN.replace(
        "@strategy",
        """
import asyncio

async def plan(mesh):
    async with mesh.request(range(40)) as (inner, request):
        engine = inner.pick(None, request)
        grant = await engine.prep_recv(request)
        await engine.release(request, grant)
    mesh.state["planned"] = True
    await asyncio.Event().wait()

@strategy(plan=plan)""",
    )
    async with router_world("d", "p", labels=LABELS) as world:
        await publish(world, planned)
        await serve(world, 1)
        plans = world.router.serving.shadows.plans
        await eventually(lambda: any(kept.state for kept in plans._kept.values()), "the plan has run")
        assert world.calls() == [("d", "StartGenerate")]
        world.index.control(ControlState(3, [ControlEntry("mine", version(1, PLAIN))]))
        await eventually(lambda: not plans._kept, "the plan has ended")
        assert world.router.control.shadows.scores() == []


@in_loop
async def test_a_request_of_its_plan_ends_with_its_time() -> None:
    planned = PLAIN.replace(
        "@strategy",
        """
import asyncio
from microserve.protocol.errors import DeadlineExceeded

async def plan(mesh):
    try:
        async with mesh.request(range(40), ttl_s=0.05):
            await asyncio.Event().wait()
    except DeadlineExceeded:
        mesh.state["out of time"] = True
    await asyncio.Event().wait()

@strategy(plan=plan)""",
    )
    async with router_world("d", "p", labels=LABELS) as world:
        await publish(world, planned)
        await serve(world, 1)
        plans = world.router.serving.shadows.plans
        await eventually(lambda: any(kept.state for kept in plans._kept.values()), "it was told")


def test_the_share_is_of_its_own_lots() -> None:
    book = StrategyBook(BUILT_IN)
    ids = [f"r{random.Random(n).getrandbits(60):x}" for n in range(10_000)]
    canary = replace(data_parallel, version=7)
    book.published = {"mine": Published(data_parallel, canary, 0.5, data_parallel, 0.1)}
    shadowed = {name for name in ids if book.shadow("mine", name) is not None}
    in_canary = {name for name in shadowed if book.published["mine"].choose(name) is canary}
    assert 900 <= len(shadowed) <= 1100
    assert 0.4 * len(shadowed) <= len(in_canary) <= 0.6 * len(shadowed)
    assert book.shadow("auto", "r1") is None
