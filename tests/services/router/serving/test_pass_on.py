"""A strategy yields its generation as a whole: all of it comes, in order, and the strategy is not woken."""

from __future__ import annotations

import pytest
import structlog

from microserve.protocol import log
from microserve.protocol.errors import EngineLost
from microserve.protocol.messages import engine as wire
from microserve.services.links.stream import Tokens
from microserve.services.router.authoring import Chunks, Mesh, Request
from microserve.services.router.authoring.action.generating import Generating
from tests.support.router.router_world import (
    eventually,
    expected_output,
    in_loop,
    router_world,
    serve_with,
    start_with,
)
from tests.support.router.scripted_engine import output_token

PROMPT = list(range(50))


@pytest.mark.parametrize("num_own", [0, 1, 2])
def test_what_is_still_to_come_is_passed_on(num_own: int) -> None:
    """Of four tokens, one a message, the strategy takes some itself."""
    steps: list[str] = []

    async def body(mesh: Mesh, request: Request) -> Chunks:
        generation = mesh.pick(None, request).start_generate(request)
        try:
            for _ in range(num_own):
                yield await anext(generation)
            yield generation
            steps.append("woken")
        finally:
            steps.append("finally")

    @in_loop
    async def main() -> None:
        async with router_world("d") as world:
            engine = world.engines["d"]
            engine.manual = True
            answer = world.gateway.start(PROMPT, strategy=start_with(world, body))
            await engine.saw(wire.StartGenerate)
            for position in range(4):
                engine.emit(wire.Delta(answer.request_id, position, [output_token(position)]))
                await answer.tokens(position + 1)
            engine.finish(answer.request_id, 4)
            assert (await answer.wait()).reason == "length"
            assert answer.token_ids == expected_output(4)
            await eventually(lambda: steps == ["finally"], "closed")

    main()


@in_loop
async def test_an_engine_that_is_lost_meanwhile_is_failed_over() -> None:
    async def body(mesh: Mesh, request: Request) -> Chunks:
        yield mesh.pick(None, request).start_generate(request)

    async with router_world("d", "e") as world:
        for engine in world.engines.values():
            engine.failures[wire.StartGenerate] = EngineLost("gone")
        first = world.engines["d"]
        del first.failures[wire.StartGenerate]
        answer = await serve_with(world, body, PROMPT)
        assert answer.token_ids == expected_output(4)


async def ended(mesh: Mesh, request: Request) -> Chunks:
    generation = mesh.pick(None, request).start_generate(request)
    async for tokens in generation:
        yield Tokens(tokens.offset, tokens.token_ids)
    yield generation


async def skipping(mesh: Mesh, request: Request) -> Chunks:
    generation = mesh.pick(None, request).start_generate(request)
    await anext(generation)
    yield generation


kept: list[Generating] = []


async def of_another(mesh: Mesh, request: Request) -> Chunks:
    kept.append(mesh.pick(None, request).start_generate(request))
    yield kept[0]


@in_loop
async def test_a_generation_that_cannot_be_passed_on_is_the_strategys_mistake_and_not_the_clients() -> None:
    for body, error in ((ended, "had ended"), (skipping, "at token"), (of_another, "of another request")):
        async with router_world("d") as world:
            if body is of_another:
                kept.clear()
                await serve_with(world, body, PROMPT)
            with structlog.testing.capture_logs() as logs:
                answer = await serve_with(world, body, PROMPT)
            assert answer.token_ids == expected_output(4)
            [event] = [entry for entry in logs if entry["event"] == log.STRATEGY_FAILED]
            assert error in event["error"]
