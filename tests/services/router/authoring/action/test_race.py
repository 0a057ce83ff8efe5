"""Races: one winner whose tokens come once, and nothing of the losers is left."""

from __future__ import annotations

import pytest
import structlog

from microserve.protocol import log
from microserve.protocol.errors import MeshError, QueueFull
from microserve.protocol.messages import engine as wire
from microserve.services.router.authoring import Chunks, Generating, Mesh, Request
from tests.support.router.router_world import (
    World,
    eventually,
    expected_output,
    in_loop,
    router_world,
    serve_with,
    start_with,
)
from tests.support.router.scripted_engine import output_token

PROMPT = list(range(50))


async def hedged(mesh: Mesh, request: Request) -> Chunks:
    """Both at once."""
    first, second = sorted(mesh.engines(), key=lambda engine: engine.id)
    yield await mesh.race(request, first, second)


def starts(world: World) -> list[str]:
    return sorted(engine.engine_id for engine in world.engines.values() if engine.of(wire.StartGenerate))


@pytest.mark.parametrize("winner", ["a", "b"])
def test_the_first_token_wins_and_the_other_engine_drops_the_request(winner: str) -> None:
    @in_loop
    async def main() -> None:
        async with router_world("a", "b") as world:
            for engine in world.engines.values():
                engine.manual = True
            answer = world.gateway.start(PROMPT, strategy=start_with(world, hedged))
            for engine in world.engines.values():
                await engine.saw(wire.StartGenerate)
            first, other = world.engines[winner], world.engines["b" if winner == "a" else "a"]
            first.emit(wire.Delta(answer.request_id, 0, [output_token(0)]))
            await answer.tokens(1)
            await other.saw(wire.Abort)
            assert not first.of(wire.Abort)
            # What the loser had on its way reaches nobody.
            other.emit(wire.Delta(answer.request_id, 0, [99, 98, 97]))
            first.emit(wire.Delta(answer.request_id, 1, [output_token(1)]))
            await answer.tokens(2)
            first.finish(answer.request_id, 2, reason="stop")
            ended = await answer.wait()
            assert (ended.reason, answer.token_ids) == ("stop", expected_output(2))
            assert sorted(ended.engines) == ["a", "b"]

    main()


@in_loop
async def test_the_second_starts_only_when_the_first_takes_too_long() -> None:
    async def patient(mesh: Mesh, request: Request) -> Chunks:
        first, second = sorted(mesh.engines(), key=lambda engine: engine.id)
        yield await mesh.race(request, first, second, after_s=60.0 if request.num_tokens < 50 else 0.05)

    async with router_world("a", "b") as world:
        name = start_with(world, patient)
        answer = await world.gateway.generate(PROMPT[:40], strategy=name)
        assert (answer.token_ids, starts(world)) == (expected_output(4), ["a"])
        world.engines["a"].manual = True
        answer = await world.gateway.generate(PROMPT, strategy=name)
        assert (answer.token_ids, starts(world)) == (expected_output(4), ["a", "b"])


@pytest.mark.parametrize("how", ["lost", "refused"])
def test_the_next_starts_at_once_when_one_fails(how: str) -> None:
    async def patient(mesh: Mesh, request: Request) -> Chunks:
        first, second = sorted(mesh.engines(), key=lambda engine: engine.id)
        yield await mesh.race(request, first, second, after_s=60.0)

    @in_loop
    async def main() -> None:
        async with router_world("a", "b") as world:
            engine = world.engines["a"]
            if how == "refused":
                engine.failures[wire.StartGenerate] = QueueFull("not now")
            else:
                engine.manual = True
            answer = world.gateway.start(PROMPT, strategy=start_with(world, patient))
            await engine.saw(wire.StartGenerate)
            if how == "lost":
                engine.die()
            assert (await answer.wait()).reason == "length"
            assert answer.token_ids == expected_output(4)

    main()


@in_loop
async def test_when_all_fail_the_last_error_comes_and_the_request_may_go_on() -> None:
    errors: list[str] = []

    async def body(mesh: Mesh, request: Request) -> Chunks:
        engines = sorted(mesh.engines(), key=lambda engine: engine.id)
        try:
            await mesh.race(request, *engines[:2])
        except MeshError as error:
            errors.append(error.code)
        yield engines[2].start_generate(request)

    async with router_world("a", "b", "c") as world:
        world.engines["a"].failures[wire.StartGenerate] = QueueFull("not now")
        world.engines["b"].failures[wire.StartGenerate] = QueueFull("not now")
        answer = await serve_with(world, body, PROMPT)
        assert (answer.token_ids, errors) == (expected_output(4), ["queue_full"])


@in_loop
async def test_a_loser_with_a_grant_gives_it_and_its_sender_back() -> None:
    async def split(mesh: Mesh, request: Request) -> Chunks:
        alone, decode, prefill = sorted(mesh.engines(), key=lambda engine: engine.id)
        grant = await decode.prep_recv(request, end=32)
        prefill.remote_send(request, grant, end=32)

        def disaggregated() -> Generating:
            return decode.start_generate(request, begin=32, grant=grant)

        yield await mesh.race(request, disaggregated, alone)

    async with router_world("a", "d", "p") as world:
        for name in ("d", "p"):
            world.engines[name].manual = True
        answer = await serve_with(world, split, PROMPT)
        assert answer.token_ids == expected_output(4)
        for name in ("d", "p"):
            await world.engines[name].saw(wire.Abort)


@in_loop
async def test_an_entrant_that_is_refused_still_sends_for_the_other() -> None:
    async def split(mesh: Mesh, request: Request) -> Chunks:
        decode, prefill = sorted(mesh.engines(), key=lambda engine: engine.id)
        grant = await decode.prep_recv(request)
        sending = prefill.remote_send(request, grant)
        yield await mesh.race(
            request, prefill, lambda: decode.start_generate(request, begin=grant.end, after=sending)
        )

    async with router_world("d", "p") as world:
        world.engines["p"].failures[wire.StartGenerate] = QueueFull("not now")
        world.engines["p"].paused.add("RemoteSend")
        answer = world.gateway.start(PROMPT, strategy=start_with(world, split))
        await world.engines["d"].saw(wire.StartGenerate)
        await world.beats(2)
        world.engines["p"].resume("RemoteSend")
        assert (await answer.wait()).reason == "length"
        assert answer.token_ids == expected_output(4)
        assert len(world.engines["d"].of(wire.StartGenerate)) == 1, "at the first attempt"


@pytest.mark.parametrize("there", ["winner", "elsewhere"])
def test_a_grant_of_an_entrant_that_never_started_is_given_back(there: str) -> None:
    async def body(mesh: Mesh, request: Request) -> Chunks:
        a, b = sorted(mesh.engines(), key=lambda engine: engine.id)
        holder = a if there == "winner" else b
        grant = await holder.prep_recv(request, end=32)
        (b if holder == a else a).remote_send(request, grant, end=32)

        def never() -> Generating:
            return holder.start_generate(request, begin=32, grant=grant)

        yield await mesh.race(request, a, never, after_s=60.0)

    @in_loop
    async def main() -> None:
        async with router_world("a", "b") as world:
            with structlog.testing.capture_logs() as lines:
                answer = await serve_with(world, body, PROMPT)
            assert answer.token_ids == expected_output(4)
            assert log.STRATEGY_FAILED not in [line["event"] for line in lines]

    main()


@pytest.mark.slow
@in_loop
async def test_what_is_no_race_is_the_authors_mistake_and_served_all_the_same() -> None:
    async def none(mesh: Mesh, request: Request) -> Chunks:
        yield await mesh.race(request)

    async def itself(mesh: Mesh, request: Request) -> Chunks:
        engine = mesh.pick(None, request)
        yield await mesh.race(request, engine, lambda: engine.start_generate(request))

    async def late(mesh: Mesh, request: Request) -> Chunks:
        yield await mesh.race(request, mesh.pick(None, request), after_s=float("nan"))

    async def nothing(mesh: Mesh, request: Request) -> Chunks:
        yield await mesh.race(request, lambda: None)  # type: ignore[arg-type, return-value]

    async def twice(mesh: Mesh, request: Request) -> Chunks:
        await mesh.race(request, *mesh.engines())
        yield await mesh.race(request, *mesh.engines())

    async with router_world("a", "b") as world:
        for body in (none, itself, late, nothing, twice):
            answer = await serve_with(world, body, PROMPT)
            assert (answer.token_ids, body.__name__) == (expected_output(4), body.__name__)
            await world.check_clean()


@in_loop
async def test_an_engine_alone_races_with_nobody() -> None:
    async def body(mesh: Mesh, request: Request) -> Chunks:
        first = mesh.pick(None, request)
        yield await mesh.race(request, first, mesh.pick(None, request, exclude=[first]))

    async with router_world("a") as world:
        with structlog.testing.capture_logs() as lines:
            answer = await serve_with(world, body, PROMPT)
        assert answer.token_ids == expected_output(4)
        assert world.calls() == [("a", "StartGenerate")]
        assert log.STRATEGY_FAILED not in [line["event"] for line in lines]


@in_loop
async def test_a_client_that_leaves_ends_all_of_a_race() -> None:
    async with router_world("a", "b") as world:
        for engine in world.engines.values():
            engine.manual = True
        answer = world.gateway.start(PROMPT, strategy=start_with(world, hedged))
        for engine in world.engines.values():
            await engine.saw(wire.StartGenerate)
        world.gateway.cancel(answer)
        assert (await answer.wait()).reason == "abort"
        for engine in world.engines.values():
            await engine.saw(wire.Abort)


@in_loop
async def test_the_winner_may_be_lost_later_and_the_answer_goes_on() -> None:
    async with router_world("a", "b") as world:
        world.engines["a"].manual = True
        world.engines["b"].manual = True
        answer = world.gateway.start(PROMPT, strategy=start_with(world, hedged))
        await world.engines["b"].saw(wire.StartGenerate)
        await world.engines["a"].saw(wire.StartGenerate)
        world.engines["a"].emit(wire.Delta(answer.request_id, 0, [output_token(0)]))
        await answer.tokens(1)
        world.engines["b"].manual = False
        world.engines["a"].die()
        assert (await answer.wait()).reason == "length"
        assert answer.token_ids == expected_output(4)
        await eventually(world.engines["b"].is_clean, "b holds nothing")
