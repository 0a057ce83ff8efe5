"""A gateway in the test's loop, run and stopped as the runner of services does it."""

from __future__ import annotations

import asyncio
import contextlib

from microserve.gateway.server import run_gateway
from microserve.protocol.bus.open import open_bus
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.settings.settings import Settings
from microserve.protocol.settings.sources import load_settings


async def serve_until(settings: Settings, lifecycle: Lifecycle, stop: asyncio.Event, drain_s: float) -> None:
    """Until ``stop`` is set; then it is cancelled, once."""
    bus = open_bus(settings, "gateway")
    try:
        gateway = asyncio.create_task(run_gateway(settings, bus, lifecycle, drain_s=drain_s))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([gateway, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        gateway.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gateway
    finally:
        bus.close()


async def serve_with(overrides: list[str], lifecycle: Lifecycle, stop: asyncio.Event, drain_s: float) -> None:
    """As :func:`serve_until`, with settings that may turn out to be wrong."""
    await serve_until(load_settings(overrides=overrides), lifecycle, stop, drain_s)
