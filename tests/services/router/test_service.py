from __future__ import annotations

import asyncio

import pytest
import structlog

from microserve.protocol import log
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import ConfigError
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.services.router.service import Router, run_router
from tests.support.router.router_world import eventually, in_loop, make_settings, router_world


@in_loop
async def test_ready_names_the_address_and_cancelling_ends_it_cleanly() -> None:
    bus = ZmqBus(linger_s=0.05)
    lifecycle = Lifecycle()
    with structlog.testing.capture_logs() as logs:
        running = asyncio.create_task(run_router(make_settings("tcp://127.0.0.1:1"), bus, lifecycle))
        async with asyncio.timeout(30):
            address = await lifecycle.wait_ready()
        running.cancel()
        await asyncio.wait([running])
    assert running.cancelled()
    assert address.startswith("tcp://127.0.0.1:")
    assert [e["address"] for e in logs if e["event"] == log.SERVICE_READY] == [address]
    assert bus.sockets == []
    bus.close()


@in_loop
async def test_an_address_in_use_is_said_and_leaves_no_socket() -> None:
    bus = ZmqBus(linger_s=0.05)
    taken = bus.server("tcp://127.0.0.1:0", lambda peer, frames: None)
    with pytest.raises(OSError, match="cannot bind"):
        await run_router(make_settings("tcp://127.0.0.1:1", address=taken.address), bus)
    taken.close()
    assert bus.sockets == []
    bus.close()


@in_loop
async def test_a_wrong_setting_is_said_before_anything_is_opened() -> None:
    bus = ZmqBus(linger_s=0.05)
    for settings, path in (
        (make_settings("tcp://127.0.0.1:1", default_strategy="best"), "router.default_strategy"),
        (make_settings("tcp://127.0.0.1:1", strategies={"auto": {"tua": 1}}), "router.strategies.auto.tua"),
    ):
        with pytest.raises(ConfigError) as caught:
            await run_router(settings, bus)
        assert caught.value.field == path
    assert bus.sockets == []
    bus.close()


@in_loop
async def test_a_seed_fixes_the_incarnation_and_an_id_is_made_up() -> None:
    bus = ZmqBus(linger_s=0.05)
    settings = make_settings("tcp://127.0.0.1:1")
    routers = [Router(settings, bus, seed=5) for _ in range(2)] + [Router(settings, bus)]
    assert routers[0].identity == routers[1].identity
    assert routers[0].identity.incarnation != routers[2].identity.incarnation
    assert routers[0].identity.router_id.startswith("router-")
    bus.close()


@in_loop
async def test_a_crash_of_a_part_ends_the_whole_service() -> None:
    async with router_world("d", check=False) as world:

        async def crash() -> None:
            raise RuntimeError("a bug")

        world.router._tasks.create_task(crash())
        await eventually(world.running.done, "ended")
        error = world.running.exception()
        assert isinstance(error, ExceptionGroup)
        assert [str(part) for part in error.exceptions] == ["a bug"]
        world.running = asyncio.create_task(asyncio.sleep(0))
