"""Actions that a strategy may not take: its author is told at the line, before anything is sent."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest
import structlog

from microserve.protocol import log
from microserve.protocol.errors import InvalidInterval, MeshError, StrategyError
from microserve.protocol.messages import engine as wire
from microserve.services.links.stream import Tokens
from microserve.services.router.authoring.action.engine import Engine
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.request.request import Request
from tests.support.router.router_world import World, expected_output, in_loop, router_world, serve_with

PROMPT = list(range(50))
Trial = Callable[[Engine, Engine, Request], Awaitable[object]]


async def expect_error(
    world: World, trial: Trial, error: type[MeshError], text: str, prompt: list[int] = PROMPT
) -> None:
    """``trial`` raises ``error`` inside a strategy; the strategy then serves plainly all the same."""
    raised: list[MeshError] = []

    async def body(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
        decode = mesh.pick("decode", request)
        prefill = mesh.pick("prefill", request, exclude=[decode])
        try:
            await trial(decode, prefill, request)
        except MeshError as mistake:
            raised.append(mistake)
        decode.abort(request)
        async for tokens in decode.start_generate(request):
            yield tokens

    answer = await serve_with(world, body, prompt)
    assert answer.token_ids == expected_output(4), answer
    assert [type(mistake) for mistake in raised] == [error], raised
    assert text in raised[0].detail


async def gap_before_generate(d: Engine, p: Engine, request: Request) -> None:
    grant = await d.prep_recv(request, end=40)
    p.remote_send(request, grant, end=20)
    d.start_generate(request, begin=40, grant=grant)


async def hole_between_sends(d: Engine, p: Engine, request: Request) -> None:
    grant = await d.prep_recv(request, end=40)
    p.remote_send(request, grant, end=10)
    p.remote_send(request, grant, begin=20, end=40)
    await d.commit(request, grant)


async def no_send_at_all(d: Engine, p: Engine, request: Request) -> None:
    grant = await d.prep_recv(request, end=40)
    d.start_generate(request, begin=40, grant=grant)


async def overlapping_sends(d: Engine, p: Engine, request: Request) -> None:
    grant = await d.prep_recv(request, end=40)
    p.remote_send(request, grant, end=20)
    p.remote_send(request, grant, begin=19, end=40)


async def wrong_begin(d: Engine, p: Engine, request: Request) -> None:
    grant = await d.prep_recv(request, end=40)
    sending = p.remote_send(request, grant, end=40)
    d.start_generate(request, begin=39, after=sending)


async def begin_without_grant(d: Engine, p: Engine, request: Request) -> None:
    d.start_generate(request, begin=10)


async def send_beyond_the_grant(d: Engine, p: Engine, request: Request) -> None:
    grant = await d.prep_recv(request, end=40)
    p.remote_send(request, grant)


async def send_backwards(d: Engine, p: Engine, request: Request) -> None:
    grant = await d.prep_recv(request, end=40)
    p.remote_send(request, grant, begin=30, end=20)


async def first_token_too_early(d: Engine, p: Engine, request: Request) -> None:
    grant = await d.prep_recv(request, end=40)
    p.remote_send(request, grant, end=40, first_token=True)


async def end_outside_the_prompt(d: Engine, p: Engine, request: Request) -> None:
    await d.prep_recv(request, end=51)


async def begin_outside_the_prompt(d: Engine, p: Engine, request: Request) -> None:
    d.start_generate(request, begin=-51)


@pytest.mark.parametrize(
    ("trial", "text"),
    [
        (gap_before_generate, "no send covers [20, ...) of the grant's [0, 40)"),
        (hole_between_sends, "no send covers [10, ...) of the grant's [0, 40)"),
        (no_send_at_all, "no send covers [0, ...)"),
        (overlapping_sends, "[19, 40) overlaps the send of [0, 20)"),
        (wrong_begin, "begin is 39, but the engine has KV up to 40"),
        (begin_without_grant, "begin is 10, but the engine has KV up to 0"),
        (send_beyond_the_grant, "[0, 50) is not inside the grant's [0, 40)"),
        (send_backwards, "[30, 20) is not inside the grant's [0, 40)"),
        (first_token_too_early, "only at the prompt's end"),
        (end_outside_the_prompt, "end 51 is outside a prompt of 50 tokens"),
        (begin_outside_the_prompt, "begin -51 is outside a prompt of 50 tokens"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_intervals_that_do_not_fit(trial: Trial, text: str) -> None:
    @in_loop
    async def main() -> None:
        async with router_world("d", "p", labels={"d": ["decode"], "p": ["prefill"]}) as world:
            await expect_error(world, trial, InvalidInterval, text)

    main()


async def two_generates(d: Engine, p: Engine, request: Request) -> None:
    d.start_generate(request)
    p.start_generate(request)


async def nobody_samples(d: Engine, p: Engine, request: Request) -> None:
    grant = await d.prep_recv(request)
    sending = p.remote_send(request, grant, first_token=False)
    d.start_generate(request, begin=request.num_tokens, after=sending)


async def grant_of_another_engine(d: Engine, p: Engine, request: Request) -> None:
    grant = await d.prep_recv(request, end=40)
    sending = p.remote_send(request, grant, end=40)
    p.start_generate(request, begin=40, after=sending)


async def grant_used_twice(d: Engine, p: Engine, request: Request) -> None:
    grant = await d.prep_recv(request, end=40)
    p.remote_send(request, grant, end=40)
    await d.commit(request, grant)
    await d.release(request, grant)


async def send_into_a_used_grant(d: Engine, p: Engine, request: Request) -> None:
    grant = await d.prep_recv(request, end=40)
    await d.release(request, grant)
    p.remote_send(request, grant, end=40)


async def after_another_grant(d: Engine, p: Engine, request: Request) -> None:
    grant = await d.prep_recv(request, end=40)
    other = await p.prep_recv(request, end=40)
    d.start_generate(request, begin=40, grant=other, after=p.remote_send(request, grant, end=40))


async def too_many_lanes(d: Engine, p: Engine, request: Request) -> None:
    grant = await d.prep_recv(request, end=40)
    for begin in range(40):
        p.remote_send(request, grant, begin=begin, end=begin + 1)


async def another_request(d: Engine, p: Engine, request: Request) -> None:
    other = Request("other", [1], request.sampling, request.deadline, 16)
    d.start_generate(other)


@pytest.mark.parametrize(
    ("trial", "text"),
    [
        (two_generates, "a request generates once"),
        (nobody_samples, "no sender samples the first token"),
        (grant_of_another_engine, "the grant is one of engine d, not of p"),
        (grant_used_twice, "was used already"),
        (send_into_a_used_grant, "was used already"),
        (after_another_grant, "'after' sends into another grant"),
        (too_many_lanes, "a grant takes at most 4 sends"),
        (another_request, "not other"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_actions_that_do_not_go_together(trial: Trial, text: str) -> None:
    serves_after = trial is not two_generates

    @in_loop
    async def main() -> None:
        async with router_world("d", "p", labels={"d": ["decode"], "p": ["prefill"]}) as world:
            if serves_after:
                await expect_error(world, trial, StrategyError, text)
                return

            async def body(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
                await trial(mesh.pick("decode", request), mesh.pick("prefill", request), request)
                yield Tokens(0, [])

            with structlog.testing.capture_logs() as logs:
                answer = await serve_with(world, body, PROMPT)
            assert answer.token_ids == expected_output(4), answer
            told = [entry["error"] for entry in logs if entry["event"] == log.STRATEGY_FAILED]
            assert len(told) == 1
            assert text in told[0]

    main()


@in_loop
async def test_an_abort_that_is_repeated_is_said_once() -> None:
    async def body(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
        engine = mesh.pick(None, request)
        for _ in range(2):
            await engine.prep_recv(request)
            for _ in range(100):
                engine.abort(request)
        async for tokens in engine.start_generate(request):
            yield tokens

    async with router_world("d", liveness=600) as world:
        answer = await serve_with(world, body, PROMPT)
        assert answer.token_ids == expected_output(4)
        told = {abort.call_id for abort in world.engines["d"].of(wire.Abort)}
        assert len(told) < 100, "not 200: once each time, and again until it is confirmed"
