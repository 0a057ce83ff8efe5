"""An engine service's end: by signal or by ``Drain`` the same, held by what runs, never beyond its bound."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from microserve.protocol.errors import Draining, InvalidRequest
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.simulation.engine.hash_runner import expected_tokens
from tests.support.engine.engine_client import EngineClient
from tests.support.engine.engine_world import INCARNATION, VOCAB, EngineWorld, engine_world
from tests.support.router.router_world import eventually, in_loop

PROMPT = list(range(10, 31))
PARAMS = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)


@asynccontextmanager
async def world(*, drain_s: float = 20.0) -> AsyncIterator[tuple[EngineWorld, EngineClient]]:
    async with engine_world(drain_s=drain_s) as one, EngineClient(one.bus, one.lifecycle.address) as client:
        yield one, client


async def start(client: EngineClient, request_id: str = "r") -> None:
    await client.call(wire.Accepted, wire.StartGenerate, request_id, 0, PARAMS, 60.0, tokens=PROMPT)


async def ask_to_leave(one: EngineWorld, client: EngineClient, how: str) -> None:
    if how == "signal":
        one.task.cancel()
    else:
        await client.call(wire.Done, wire.Drain, INCARNATION)
    await eventually(lambda: client.heartbeat is not None and client.heartbeat.load.draining, "a heartbeat")


def told(one: EngineWorld) -> list[Any]:
    return [member.load.draining for member in one.members]


@pytest.mark.parametrize("how", ["signal", "message"])
def test_an_idle_engine_leaves_at_once(how: str) -> None:
    @in_loop
    async def main() -> None:
        async with world() as (one, client):
            if how == "signal":
                one.task.cancel()
            else:
                await client.call(wire.Done, wire.Drain, INCARNATION)
            await one.ended()
            assert one.task.cancelled() is (how == "signal")
            if how == "message":
                assert one.task.exception() is None

    main()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["signal", "message", "message, then signal"])
def test_what_runs_holds_it_a_member_until_its_end(how: str) -> None:
    @in_loop
    async def main() -> None:
        async with world() as (one, client):
            await start(client)
            await ask_to_leave(one, client, how.partition(",")[0])
            await eventually(lambda: told(one) == [True], "the index knows")
            if how.endswith("then signal"):
                one.task.cancel()
            with pytest.raises(Draining):
                await start(client, "another")
            assert not one.task.done()
            one.gate.set()
            tokens, finished = await client.finished("r")
            assert (tokens, finished.reason) == (expected_tokens(PROMPT, PARAMS, vocab_size=VOCAB), "length")
            await one.ended()

    main()


@pytest.mark.parametrize("how", ["signal", "message"])
def test_it_leaves_at_its_bound_whatever_is_left(how: str) -> None:
    @in_loop
    async def main() -> None:
        async with world(drain_s=0.2) as (one, client):
            await start(client)
            await ask_to_leave(one, client, how)
            await one.ended()
            assert "r" not in client.deltas

    main()


@in_loop
async def test_the_heartbeat_that_says_so_comes_with_the_answer() -> None:
    async with world() as (one, client):
        await start(client)
        await client.call(wire.Done, wire.Drain, INCARNATION)
        assert client.heartbeat is not None and client.heartbeat.load.draining
        await client.call(wire.Done, wire.Drain, INCARNATION)
        assert not one.task.done()


@pytest.mark.parametrize("how", ["signal", "message"])
def test_a_step_that_fails_ends_a_draining_engine_as_any_other(how: str) -> None:
    @in_loop
    async def main() -> None:
        async with world() as (one, client):
            await start(client)
            await ask_to_leave(one, client, how)

            def broken(now: float) -> object:
                raise ZeroDivisionError

            one.core.stepper.next_step = broken  # type: ignore[method-assign,assignment]
            one.gate.set()
            async with asyncio.timeout(60):
                await asyncio.wait([one.task])
            assert not one.task.cancelled()
            error = one.task.exception()
            assert isinstance(error, ExceptionGroup)
            assert [str(each) for each in error.exceptions] == ["the step thread has ended; see step.failed"]

    main()


@in_loop
async def test_a_drain_that_means_another_life_is_refused() -> None:
    """What was sent to the engine that had this address before, and junk, end nothing."""
    async with world() as (one, client):
        for arguments in ([], [INCARNATION + 1]):
            with pytest.raises(InvalidRequest, match="another life"):
                await client.call(wire.Done, wire.Drain, *arguments)
        assert not one.core.state.draining
