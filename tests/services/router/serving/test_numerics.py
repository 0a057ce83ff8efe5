"""Numerics classes in a router: what it prefers, what it tells engines and gateways, and what it promises."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import msgspec
import pytest
import structlog

from microserve.protocol import log
from microserve.protocol.errors import EngineLost
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.numerics import MIXED, UNKNOWN, Numerics
from microserve.services.links.stream import Tokens
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.request.request import Request
from tests.support.bus.gateway_peer import Answer
from tests.support.router.router_world import (
    World,
    eventually,
    expected_output,
    in_loop,
    router_world,
    serve_with,
)
from tests.support.router.scripted_engine import ScriptedEngine

PROMPT = list(range(100))
MAX_TOKENS = 8
A, B = Numerics("a", is_exact=True), Numerics("b", is_exact=True)
LOOSE = Numerics("loose")
BOTH = Numerics(MIXED)
SPLITS = ("disaggregated", "balanced", "cache_aware", "migrate")


async def add(world: World, **classes: Numerics) -> None:
    """Engines by id, each of a class."""
    for engine_id, numerics in classes.items():
        world.add_engine(engine_id, numerics=numerics)
    await world.list_engines()


async def begun_on(world: World, engine: ScriptedEngine, count: int = 2) -> Answer:
    """A request that has ``count`` tokens from an engine, and waits for more."""
    engine.manual = True
    await world.list_engines(engine)
    answer = world.gateway.start(PROMPT, max_tokens=MAX_TOKENS, strategy="data_parallel")
    await engine.saw(wire.StartGenerate)
    engine.emit(wire.Delta(answer.request_id, 0, expected_output(count)))
    await answer.tokens(count)
    return answer


# --- what it promises -----------------------------------------------------------------------------------


@pytest.mark.parametrize("numerics", [A, LOOSE, UNKNOWN])
@in_loop
async def test_an_answer_of_one_engine_is_of_its_class(numerics: Numerics) -> None:
    async with router_world() as world:
        await add(world, e=numerics)
        with structlog.testing.capture_logs() as logs:
            answer = await world.gateway.generate(PROMPT)
        assert answer.result.numerics == numerics
        [line] = [entry for entry in logs if entry["event"] == log.REQUEST_FINISHED]
        assert (line["numerics"], line["exact"]) == (numerics.name, numerics.is_exact)


@pytest.mark.parametrize("strategy", SPLITS)
@pytest.mark.parametrize(("decode", "prefill", "told"), [(A, A, A), (A, B, BOTH), (A, UNKNOWN, BOTH)])
@in_loop
async def test_an_answer_is_of_all_that_worked_on_it(
    strategy: str, decode: Numerics, prefill: Numerics, told: Numerics
) -> None:
    async with router_world(labels={}) as world:
        world.add_engine("d", labels=["decode"], numerics=decode)
        world.add_engine("p", labels=["prefill"], numerics=prefill)
        await world.list_engines()
        answer = await world.gateway.generate(PROMPT, strategy=strategy)
        assert answer.token_ids == expected_output(4)
        calls = [call for e in world.engines.values() for call in e.of(wire.StartGenerate)]
        if strategy == "migrate":  # of another class nothing would be kept: it is not even sent
            assert answer.result.numerics.is_exact or prefill is UNKNOWN
            assert [call.numerics for call in calls] == [""]
            commits = [c.numerics for e in world.engines.values() for c in e.of(wire.Commit)]
            assert all(name in (decode.name, prefill.name) for name in commits)
        else:
            assert answer.result.numerics == told
            assert [call.numerics for call in calls] == [prefill.name]


@in_loop
async def test_kv_that_the_receiver_has_already_makes_nothing_mixed() -> None:
    async with router_world() as world:
        world.add_engine("d", labels=["decode"], numerics=A).matched = len(PROMPT)
        world.add_engine("p", labels=["prefill"], numerics=B)
        await world.list_engines()
        answer = await world.gateway.generate(PROMPT, strategy="cache_aware")
        assert answer.result.numerics == A
        [start] = world.engines["d"].of(wire.StartGenerate)
        assert start.numerics == ""


@in_loop
async def test_several_senders_of_several_classes() -> None:
    async def body(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
        d, p, q = (next(e for e in mesh.engines() if e.id == name) for name in "dpq")
        grant = await d.prep_recv(request, end=96)
        p.remote_send(request, grant, begin=0, end=48)
        q.remote_send(request, grant, begin=48, end=96)
        async for tokens in d.start_generate(request, begin=96, grant=grant):
            yield tokens

    for q, told, said in ((A, A, "a"), (B, BOTH, MIXED)):
        async with router_world() as world:
            await add(world, d=A, p=A, q=q)
            answer = await serve_with(world, body, PROMPT)
            assert answer.result.numerics == told
            [start] = world.engines["d"].of(wire.StartGenerate)
            assert start.numerics == said


@in_loop
async def test_what_the_engine_says_counts_too() -> None:
    async with router_world() as world:
        e = world.add_engine("e", numerics=A)
        answer = await begun_on(world, e, MAX_TOKENS)
        e.finish(answer.request_id, MAX_TOKENS, numerics=BOTH)
        assert (await answer.wait()).numerics == BOTH


# --- what a gateway is told, and when -------------------------------------------------------------------


@in_loop
async def test_the_class_comes_with_the_first_tokens_and_when_it_changes() -> None:
    async with router_world() as world:
        a, b = world.add_engine("a", numerics=A), world.add_engine("b", numerics=B)
        answer = await begun_on(world, a)
        assert answer.numerics == [A]
        a.emit(wire.Delta(answer.request_id, 2, expected_output(3)[2:]))
        await answer.tokens(3)
        assert answer.numerics == [A]
        await world.list_engines()
        b.manual = True
        a.die()
        await b.saw(wire.StartGenerate)
        b.emit(wire.Delta(answer.request_id, 3, expected_output(4)[3:]))
        await answer.tokens(4)
        assert answer.numerics == [A, BOTH]
        b.finish(answer.request_id, 4)
        assert (await answer.wait()).numerics == BOTH


@pytest.mark.parametrize(("before", "told"), [(A, A), (B, BOTH), (UNKNOWN, BOTH), (BOTH, BOTH)])
@in_loop
async def test_output_that_another_router_delivered(before: Numerics, told: Numerics) -> None:
    async with router_world() as world:
        await add(world, e=A)
        answer = await world.gateway.generate(PROMPT, output=expected_output(2), numerics=before)
        assert answer.token_ids == expected_output(4)
        assert answer.result.numerics == told


@in_loop
async def test_who_goes_on_with_an_answer_says_its_class_with_the_first_tokens() -> None:
    """It may not live to say it at the end, and the next one is told what the gateway knows."""
    async with router_world() as world:
        engine = world.add_engine("e", numerics=A)
        engine.manual = True
        await world.list_engines(engine)
        answer = world.gateway.start(
            PROMPT, max_tokens=MAX_TOKENS, strategy="data_parallel", output=expected_output(2), numerics=A
        )
        await engine.saw(wire.StartGenerate)
        engine.emit(wire.Delta(answer.request_id, 2, expected_output(3)[2:]))
        await eventually(lambda: bool(answer.numerics), "its class is said")
        assert answer.numerics == [A]
        engine.finish(answer.request_id, 3)
        await answer.wait()


@in_loop
async def test_an_answer_that_was_whole_already_is_of_the_class_that_its_gateway_says() -> None:
    async with router_world() as world:
        await add(world, e=B)
        answer = await world.gateway.generate(PROMPT, output=expected_output(4), numerics=A)
        assert answer.result.reason == "length" and answer.result.numerics == A
        assert not world.engines["e"].calls


@in_loop
async def test_without_output_nothing_is_said_of_a_class() -> None:
    async with router_world() as world:
        await add(world, e=A)
        world.engines["e"].failures[wire.StartGenerate] = EngineLost("no")
        answer = await world.gateway.generate(PROMPT, numerics=B)
        assert answer.result.reason == "error" and answer.result.numerics == UNKNOWN


# --- what it prefers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("began", [A, LOOSE])
@in_loop
async def test_a_stream_goes_on_in_the_class_in_which_it_began(began: Numerics) -> None:
    """The other engine of its class has more to do than those of the other one. Also of a class that promises
    nothing, as vLLM's."""
    async with router_world() as world:
        dying = world.add_engine("a", numerics=began)
        answer = await begun_on(world, dying)
        busy = world.add_engine("a2", numerics=began)
        busy.load = wire.EngineLoad(num_running=7, queued_prefill_tokens=5000)
        await add(world, b=B, b2=B)
        dying.die()
        assert (await answer.wait()).numerics == began
        assert answer.token_ids == expected_output(MAX_TOKENS)
        assert answer.result.engines == ["a", "a2"]


@in_loop
async def test_one_that_is_alone_of_its_class_does_all_the_work_of_what_began_in_it() -> None:
    """Disaggregated, labelled and all: what began bit for bit sees no engine of another class."""
    async with router_world() as world:
        dying = world.add_engine("a", numerics=A)
        dying.manual = True
        await world.list_engines()
        answer = world.gateway.start(PROMPT, max_tokens=MAX_TOKENS, strategy="disaggregated")
        await answer.tokens(1)
        world.add_engine("b", labels=["decode"], numerics=B)
        world.add_engine("a2", labels=["prefill"], numerics=A)
        await world.list_engines()
        dying.die()
        assert (await answer.wait()).numerics == A
        assert answer.result.engines == ["a", "a2"]


@pytest.mark.parametrize("began", [A, LOOSE])
@in_loop
async def test_without_an_engine_of_its_class_it_goes_on_in_another(began: Numerics) -> None:
    async with router_world() as world:
        dying = world.add_engine("a", numerics=began)
        answer = await begun_on(world, dying)
        await add(world, b=B)
        with structlog.testing.capture_logs() as logs:
            dying.die()
            assert (await answer.wait()).numerics == BOTH
        assert answer.token_ids == expected_output(MAX_TOKENS)
        [line] = [entry for entry in logs if entry["event"] == log.REQUEST_FINISHED]
        assert (line["numerics"], line["exact"], line["engines"]) == (MIXED, False, ["a", "b"])


@pytest.mark.parametrize(("others", "target", "told"), [((A, B), "x0", A), ((B, B), None, BOTH)])
@in_loop
async def test_a_stream_moves_from_an_engine_that_drains_within_its_class(
    others: tuple[Numerics, ...], target: str | None, told: Numerics
) -> None:
    async with router_world() as world:
        leaving = world.add_engine("a", numerics=A)
        answer = await begun_on(world, leaving)
        await add(world, **{f"x{number}": numerics for number, numerics in enumerate(others)})
        if target is not None:
            world.engines[target].load = wire.EngineLoad(num_running=7)
        leaving.load = msgspec.structs.replace(leaving.load, draining=True)
        assert (await answer.wait()).numerics == told
        assert answer.token_ids == expected_output(MAX_TOKENS)
        assert target is None or answer.result.engines == ["a", target]
        [start] = [
            call for e in world.engines.values() if e is not leaving for call in e.of(wire.StartGenerate)
        ]
        assert start.numerics == "a"


@pytest.mark.parametrize("strategy", ["disaggregated", "balanced", "cache_aware"])
@pytest.mark.parametrize("kind", [A, LOOSE])
@in_loop
async def test_prefill_and_decode_are_of_one_class_where_they_can_be(strategy: str, kind: Numerics) -> None:
    """For many requests: the first engine by lot, the second of its class, however busy."""
    async with router_world() as world:
        await add(world, a=kind, a2=kind, b=B, b2=B)
        for _ in range(12):
            answer = await world.gateway.generate(PROMPT, strategy=strategy)
            assert answer.result.numerics in (kind, B)
            assert {each[0] for each in answer.result.engines} in ({"a"}, {"b"})
            assert len(answer.result.engines) == 2


@pytest.mark.parametrize("strategy", ["auto", "conditional", "balanced_adaptive", "min_ttft"])
@in_loop
async def test_who_may_stay_at_home_does_before_its_answer_is_of_two_classes(strategy: str) -> None:
    settings = {"auto": {"threshold": 1}, "balanced_adaptive": {"min_share": 1}}
    settings |= {"conditional": {"max_tokens": 0}}
    async with router_world(strategies=settings) as world:
        await add(world, a=A, b=B)
        for number in range(6):
            prompt = [number, *PROMPT]
            answer = await world.gateway.generate(prompt, strategy=strategy)
            assert answer.result.numerics in (A, B), answer.result


@pytest.mark.parametrize("is_exact", [True, False])
@in_loop
async def test_min_ttft_fetches_only_what_is_kept(is_exact: bool) -> None:
    async with router_world() as world:
        a = world.add_engine("a", numerics=A)
        world.add_engine("b", numerics=Numerics("b", is_exact))
        await world.list_engines()
        a.store(PROMPT)
        a.load = wire.EngineLoad(queued_prefill_tokens=9000, prefill_tokens_per_s=100.0)
        await world.beats(3)
        answer = await world.gateway.generate(PROMPT, strategy="min_ttft")
        assert answer.result.engines == (["b"] if is_exact else ["b", "a"])
        assert answer.result.numerics.name == "b"
