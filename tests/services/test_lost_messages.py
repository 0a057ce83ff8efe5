"""Whichever message is lost on a living connection: right tokens, or an error to be retried, in time."""

from __future__ import annotations

import asyncio
import time

import pytest

from microserve.gateway.routers.client import RouterClient
from microserve.gateway.routers.mailbox import Inbox
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.bus.lossy_bus import LossyBus
from tests.support.bus.lossy_mesh import LossyMesh, lossy_mesh, oracle
from tests.support.router.router_world import eventually, in_loop

PARAMS = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
TTL_S = 300.0
"""An answer is waited for 15 s only, so it cannot be the deadline that ends a request."""


def count_of(bus: LossyBus) -> int:
    return bus.num_up + bus.num_down


async def serve(mesh: LossyMesh, number: int, strategy: str) -> None:
    """One request with a prompt of its own: right tokens, and nothing left behind.

    Where the only engine is just then not joined, the answer is a retryable error first."""
    prompt = [(7 * number + i) % 400 for i in range(30)]
    while True:
        answer = await mesh.gateway.generate(
            prompt, strategy=strategy, ttl_s=TTL_S, max_tokens=5, temperature=0.0, ignore_eos=True
        )
        if answer.result.code != "no_engines" or len(mesh.cores) > 1:
            break
        await mesh.joined()
    assert (answer.result.reason, answer.result.code) == ("length", ""), answer.result
    assert answer.token_ids == oracle(prompt, PARAMS)
    await mesh.at_rest()


@pytest.mark.parametrize("strategy", ["data_parallel", "disaggregated", "balanced"])
@pytest.mark.parametrize("way", ["to engines", "from engines"])
@in_loop
async def test_every_message_of_a_request_may_be_lost(way: str, strategy: str) -> None:
    async with lossy_mesh("a", "b") as mesh:
        await mesh.joined()
        bus = mesh.to_engines if way == "to engines" else mesh.from_engines
        before = count_of(bus)
        await serve(mesh, 0, strategy)
        num_messages = count_of(bus) - before
        assert 1 <= num_messages < 50
        for n in range(1, num_messages + 3):  # and heartbeats or pings behind it
            have = bus.num_swallowed
            bus.swallow_up = {bus.num_up + n}
            bus.swallow_down = {bus.num_down + n}
            await serve(mesh, n, strategy)
            print(way, strategy, n, "lost" if bus.num_swallowed > have else "not reached")


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("way", ["to engines", "from engines"])
@in_loop
async def test_every_message_of_the_hello_may_be_lost(way: str, n: int) -> None:
    async with lossy_mesh("a") as mesh:
        bus = mesh.to_engines if way == "to engines" else mesh.from_engines
        bus.swallow_up = bus.swallow_down = {n}
        await mesh.joined()
        await serve(mesh, n, "data_parallel")


@pytest.mark.parametrize("way", ["to engines", "from engines"])
@in_loop
async def test_the_only_engine_of_a_mesh_serves_on_after_each_loss(way: str) -> None:
    async with lossy_mesh("a") as mesh:
        await mesh.joined()
        bus = mesh.to_engines if way == "to engines" else mesh.from_engines
        for n in range(1, 8):
            bus.swallow_up, bus.swallow_down = {bus.num_up + n}, {bus.num_down + n}
            await serve(mesh, n, "data_parallel")


@in_loop
async def test_every_message_between_gateway_and_router_may_be_lost() -> None:
    """The connection is over then, and its request goes on by the next one, without a gap."""
    async with lossy_mesh("a") as mesh:
        await mesh.joined()
        routers = RouterClient(
            mesh.from_gateways,
            [mesh.router.address],
            gateway_id="g",
            incarnation=1,
            model="hash",
            credit=2,
            heartbeat_interval_s=mesh.settings.bus.heartbeat_interval_s,
            liveness=mesh.settings.bus.liveness,
            clock=time.monotonic,
        )
        routers.start()
        try:
            await ask(routers, 0)
            up, down = mesh.from_gateways, mesh.to_gateways
            moves = 0
            for n in range(1, 10):
                up.swallow_up = {up.num_up + n}
                moves += await ask(routers, 2 * n)
                down.swallow_down = {down.num_down + n}
                moves += await ask(routers, 2 * n + 1)
                await mesh.at_rest()
            assert moves, "no loss hit a request"
        finally:
            await routers.close()


async def ask(routers: RouterClient, number: int) -> bool:
    """One request, whole and exact; whether it had to move to another connection."""
    prompt = [(7 * number + i) % 400 for i in range(30)]
    await eventually(lambda: routers.ready, "a router")
    tokens: list[int] = []
    inbox = Inbox()
    mailbox = routers.generate(
        inbox,
        routers.choose(),
        request_id=f"g{number}",
        index=0,
        tokens=prompt,
        sampling=PARAMS,
        ttl_s=TTL_S,
        strategy="data_parallel",
    )
    async with asyncio.timeout(15):
        while not mailbox.over:
            await inbox.wait()
            tokens += mailbox.take().token_ids
    routers.forget(mailbox)
    assert mailbox.failed is None
    assert mailbox.ended is not None
    assert (mailbox.ended.reason, tokens) == ("length", oracle(prompt, PARAMS)), mailbox.ended
    return mailbox.request_id != f"g{number}"
