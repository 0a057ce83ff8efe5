"""All that an engine keeps of time is by the clock that it was given, wherever that starts: here it stands
still until the test moves it, so whatever is measured by another one never ends, or ends at once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import pytest

from microserve.protocol.errors import DeadlineExceeded, UnknownRequest
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.actions import MOVE_S
from tests.support.engine.engine_client import EngineClient
from tests.support.engine.engine_world import EngineWorld, engine_world
from tests.support.router.router_world import eventually, in_loop

PROMPT = list(range(10, 31))
PARAMS = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
ZEROS = [-1e9, 0.0, 1e9]
"""A monotonic clock and an event loop's are near none of them."""
LEASE_S, DRAIN_S = 5.0, 20.0
"""As the engine of ``engine_world`` has them."""


class HandClock:
    def __init__(self, zero: float) -> None:
        self.now = zero

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def world(clock: HandClock) -> AsyncIterator[tuple[EngineWorld, EngineClient]]:
    async with (
        engine_world(drain_s=DRAIN_S, clock=clock) as one,
        EngineClient(one.bus, one.lifecycle.address) as client,
    ):
        yield one, client


async def called(target: object, name: str) -> None:
    """The engine's own next call of a method, begun from now on, has returned."""
    original, num_returned = getattr(target, name), 0

    def counted(*args: Any) -> Any:
        nonlocal num_returned
        result = original(*args)
        num_returned += 1
        return result

    with mock.patch.object(target, name, counted):
        await eventually(lambda: num_returned >= 2, f"{name} is called")  # one may have begun before


async def steps(one: EngineWorld) -> None:
    await called(one.core, "step")


@pytest.mark.parametrize("zero", ZEROS)
def test_leases_and_deadlines(zero: float) -> None:
    @in_loop
    async def main() -> None:
        clock = HandClock(zero)
        async with world(clock) as (one, client):
            granted = await client.call(wire.Granted, wire.PrepRecv, "r", 16, 60.0, tokens=PROMPT)
            clock.now += LEASE_S - 0.1
            await steps(one)
            grant_id = granted.grant.grant_id
            await client.call(wire.Accepted, wire.StartGenerate, "r", 16, PARAMS, 60.0, grant_id)
            clock.now += 59.0
            await steps(one)
            assert "r" not in client.deltas  # no lease holds it any more, and its deadline is not over
            clock.now += 1.1
            _, finished = await client.finished("r")
            assert finished.code == DeadlineExceeded.code

            granted = await client.call(wire.Granted, wire.PrepRecv, "q", 16, 60.0, tokens=PROMPT)
            clock.now += LEASE_S
            await steps(one)
            with pytest.raises(UnknownRequest):
                await client.call(
                    wire.Accepted, wire.StartGenerate, "q", 16, PARAMS, 60.0, granted.grant.grant_id
                )

    main()


@pytest.mark.parametrize("zero", ZEROS)
def test_a_drain(zero: float) -> None:
    @in_loop
    async def main() -> None:
        clock = HandClock(zero)
        async with world(clock) as (one, client):
            granted = await client.call(wire.Granted, wire.PrepRecv, "r", 16, 600.0, tokens=PROMPT)
            await client.call(
                wire.Accepted, wire.StartGenerate, "r", 16, PARAMS, 600.0, granted.grant.grant_id
            )
            one.task.cancel()
            await eventually(lambda: client.heartbeat and client.heartbeat.load.draining, "it drains")
            clock.now += DRAIN_S - 0.1
            await called(one.core.state, "is_drained")
            assert not one.task.done()
            clock.now += 0.2
            await one.ended()

    main()


@pytest.mark.parametrize("zero", ZEROS)
def test_a_stream_about_to_move_holds_a_drain_for_a_while(zero: float) -> None:
    @in_loop
    async def main() -> None:
        clock = HandClock(zero)
        async with world(clock) as (one, client):
            many = SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True)
            await client.call(wire.Accepted, wire.StartGenerate, "r", 0, many, 600.0, tokens=PROMPT)
            step = one.core.step

            def one_step() -> bool:
                if stepped := step():
                    one.gate.clear()
                return stepped

            with mock.patch.object(one.core, "step", one_step):
                one.gate.set()
                await eventually(lambda: "r" in client.deltas, "a token")
            one.task.cancel()
            await eventually(lambda: client.heartbeat and client.heartbeat.load.draining, "it drains")
            await client.call(wire.Done, wire.Abort, "r")
            one.gate.set()
            await steps(one)
            clock.now += MOVE_S - 0.1
            await called(one.core.state, "is_drained")
            assert not one.task.done()
            clock.now += 0.2
            await one.ended()

    main()
