"""What clients, authors and engines see of a strategy that breaks its contract."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

import pytest
import structlog

from microserve.protocol import log
from microserve.protocol.errors import CacheFull, MeshError, StrategyError
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.engine import Finished, Timings, Usage
from microserve.services.links.stream import Tokens
from microserve.services.router.authoring.action.engine import Engine
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.request.request import Request
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


async def broken(world: World, body: Callable[[Mesh, Request], AsyncGenerator[Tokens, None]]) -> str:
    """Serve by a strategy that must fail and say so in the log once, while its client is served."""
    with structlog.testing.capture_logs() as logs:
        answer = await serve_with(world, body, PROMPT)
        await world.check_clean()
    assert answer.result.reason == "length"
    assert answer.token_ids == expected_output(4)
    events = [entry for entry in logs if entry["event"] == log.STRATEGY_FAILED]
    assert len(events) == 1
    assert events[0]["request_id"] == answer.request_id
    assert events[0]["exc_info"] is not None
    return str(events[0]["error"])


FINISHED = Finished("length", Usage(), Timings())


async def raises(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    async for tokens in mesh.pick(None, request).start_generate(request):
        yield Tokens(tokens.offset, tokens.token_ids)
        raise ZeroDivisionError("ratio")


async def ends_early(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    mesh.pick(None, request).start_generate(request)
    return
    yield


async def yields_junk(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    yield [1, 2]  # type: ignore[misc]


async def repeats(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    async for tokens in mesh.pick(None, request).start_generate(request):
        yield Tokens(tokens.offset, tokens.token_ids)
        yield Tokens(0, [])


async def makes_up(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    async for tokens in mesh.pick(None, request).start_generate(request):
        yield Tokens(tokens.offset, [token + 1 for token in tokens.token_ids], finished=tokens.finished)


async def changes_in_place(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    async for tokens in mesh.pick(None, request).start_generate(request):
        tokens.token_ids[:] = [token + 1 for token in tokens.token_ids]
        yield tokens


async def cuts_short(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    async for tokens in mesh.pick(None, request).start_generate(request):
        yield Tokens(tokens.offset, tokens.token_ids, finished=FINISHED)


async def leaves_the_last_out(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    given: list[int] = []
    async for tokens in mesh.pick(None, request).start_generate(request):
        given += tokens.token_ids
    yield Tokens(0, given[:-1], finished=tokens.finished)


async def skips(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    yield Tokens(1, [3], finished=FINISHED)


async def times_out_by_itself(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    async with asyncio.timeout(0):
        await asyncio.sleep(60)
    yield Tokens(0, [])


async def cancels_itself(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    raise asyncio.CancelledError
    yield


async def bad_interval(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    mesh.pick(None, request).start_generate(request, begin=3)
    yield Tokens(0, [])


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (raises, "ratio"),
        (ends_early, "ended before its stream did"),
        (yields_junk, "yielded list, not Tokens"),
        (repeats, "yielded token 0, not"),
        (makes_up, "tokens that no engine gave"),
        (changes_in_place, "tokens that no engine gave"),
        (cuts_short, "tokens that no engine gave"),
        (leaves_the_last_out, "tokens that no engine gave"),
        (skips, "yielded token 1, not 0"),
        (times_out_by_itself, ""),
        (cancels_itself, "cancelled itself"),
        (bad_interval, "begin is 3"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_client_of_a_broken_strategy_is_served(
    body: Callable[[Mesh, Request], AsyncGenerator[Tokens, None]], text: str
) -> None:
    @in_loop
    async def main() -> None:
        async with router_world("d", "p") as world:
            assert text in await broken(world, body)
            # The next request is none the worse.
            assert (await world.gateway.generate(PROMPT)).token_ids == expected_output(4)

    main()


@in_loop
async def test_what_fails_inside_a_strategys_own_task_group_keeps_its_code() -> None:
    async with router_world("d", "p", call_timeout_s=1.0) as world:
        for engine in world.engines.values():
            engine.failures[wire.PrepRecv] = CacheFull("no room", retry_after_s=1.0)

        async def body(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
            async with asyncio.TaskGroup() as tasks:
                for engine in mesh.engines():
                    tasks.create_task(engine.prep_recv(request, end=16))
            yield Tokens(0, [])

        answer = await serve_with(world, body, PROMPT)
        assert (answer.result.code, answer.result.retry_after_s) == ("cache_full", 1.0)


@in_loop
async def test_a_forgotten_grant_is_given_back_and_reported_while_the_client_is_served() -> None:
    async with router_world("d", "p", labels={"d": ["decode"], "p": ["prefill"]}) as world:

        async def body(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
            decode, prefill = mesh.pick("decode", request), mesh.pick("prefill", request)
            grant = await prefill.prep_recv(request, end=40)
            decode.remote_send(request, grant, end=40)
            async for tokens in decode.start_generate(request):
                yield tokens

        with structlog.testing.capture_logs() as logs:
            answer = await serve_with(world, body, PROMPT)
        assert answer.result.reason == "length"
        assert answer.token_ids == expected_output(4)
        events = [entry for entry in logs if entry["event"] == log.STRATEGY_FAILED]
        assert [entry["error"] for entry in events] == ["forgotten grant p-1-1 of engine p"]
        await world.engines["p"].saw(wire.Abort)


@in_loop
async def test_a_handle_is_dead_after_its_request() -> None:
    async with router_world("d") as world:
        kept: list[tuple[Mesh, Engine, Request]] = []

        async def body(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
            kept.append((mesh, mesh.pick(None, request), request))
            async for tokens in kept[0][1].start_generate(request):
                yield tokens

        await serve_with(world, body, PROMPT)
        mesh, engine, request = kept[0]
        world.forget_calls()
        with pytest.raises(StrategyError, match="has ended"):
            await engine.prep_recv(request)
        with pytest.raises(StrategyError, match="has ended"):
            engine.start_generate(request)
        with pytest.raises(StrategyError, match="has ended"):
            mesh.pick(None, request)
        assert world.calls() == []


@in_loop
async def test_what_a_strategy_does_behind_its_last_chunk_is_not_run_but_finally_is() -> None:
    async with router_world("d") as world:
        steps: list[str] = []

        async def body(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
            engine = mesh.pick(None, request)
            try:
                async for tokens in engine.start_generate(request):
                    yield tokens
                steps.append("behind")
            finally:
                steps.append("finally")
                with pytest.raises(StrategyError, match="has ended"):
                    await engine.prep_recv(request)

        answer = await serve_with(world, body, PROMPT)
        assert answer.result.reason == "length"
        await eventually(lambda: steps == ["finally"], "closed")


@pytest.mark.slow
@in_loop
async def test_a_finally_that_hangs_or_raises_hurts_nobody() -> None:
    async with router_world("d") as world:
        ends: list[str] = []

        async def hangs(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
            try:
                async for tokens in mesh.pick(None, request).start_generate(request):
                    yield tokens
            finally:
                ends.append("finally")
                await asyncio.Event().wait()

        async def breaks(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
            try:
                async for tokens in mesh.pick(None, request).start_generate(request):
                    yield tokens
            finally:
                raise ValueError("in finally")

        with structlog.testing.capture_logs() as logs:
            for body in (hangs, breaks):
                answer = await serve_with(world, body, PROMPT)
                assert answer.result.reason == "length"
            await eventually(
                lambda: len([e for e in logs if e["event"] == log.STRATEGY_FAILED]) == 2, "both are reported"
            )
        assert ends == ["finally"]


@in_loop
async def test_a_strategy_that_swallows_its_cancellation_is_stopped_at_its_next_chunk() -> None:
    async with router_world("d") as world:
        swallowed = asyncio.Event()

        async def body(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed.set()
            async for tokens in mesh.pick(None, request).start_generate(request):
                yield tokens

        name = start_with(world, body)
        answer = world.gateway.start(PROMPT, strategy=name)
        await eventually(lambda: len(world.router.serving) == 1, "live")
        world.gateway.cancel(answer)
        assert (await answer.wait()).reason == "abort"
        assert swallowed.is_set()
        late = world.gateway.start(PROMPT, strategy=name, ttl_s=0.1)
        assert (await late.wait()).code == "deadline_exceeded"


@in_loop
async def test_a_refused_start_may_be_repeated_on_another_engine() -> None:
    async with router_world("d", "p", labels={"d": ["decode"], "p": ["prefill"]}) as world:
        world.engines["d"].failures[wire.StartGenerate] = MeshError("no room")

        async def body(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
            decode, prefill = mesh.pick("decode", request), mesh.pick("prefill", request)
            try:
                async for tokens in decode.start_generate(request):
                    yield tokens
            except MeshError:
                async for tokens in prefill.start_generate(request):
                    yield tokens

        answer = await serve_with(world, body, PROMPT)
        assert answer.token_ids == expected_output(4)
        assert answer.result.engines == ["d", "p"]


@pytest.mark.parametrize("fails", [False, True], ids=["after the end", "before another attempt"])
@pytest.mark.parametrize("leaving", [SystemExit, KeyboardInterrupt, asyncio.CancelledError])
def test_a_finally_that_wants_to_end_the_router_does_not(leaving: type[BaseException], fails: bool) -> None:
    @in_loop
    async def main() -> None:
        async with router_world("d", strategy_idle_s=0.1) as world:

            async def leaves(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
                try:
                    async for tokens in mesh.pick(None, request).start_generate(request):
                        yield Tokens(tokens.offset, tokens.token_ids[:1]) if fails else tokens
                        await asyncio.sleep(60)
                finally:
                    raise leaving

            with structlog.testing.capture_logs() as logs:
                answer = await serve_with(world, leaves, PROMPT)
                assert (answer.result.reason, answer.token_ids) == ("length", expected_output(4))
                await eventually(
                    lambda: [e for e in logs if e["event"] == log.STRATEGY_FAILED], "its author is told"
                )
            assert (await world.gateway.generate(PROMPT)).token_ids == expected_output(4)

    main()
