"""A gateway: everything made, served and closed in order.

    socket, routers -> ready ... cancelled -> nothing new, streams finish, the rest is ended

Owns the order only; each part knows how it is made and closed, and ``protocol/process/run.py`` the process.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

import structlog

from microserve.gateway.app import Application
from microserve.gateway.http.auth import KeyRing
from microserve.gateway.http.cors import with_cors
from microserve.gateway.http.exchange import BodyBudget
from microserve.gateway.http.server import address_of, bind, make_server
from microserve.gateway.metrics import GatewayMetrics
from microserve.gateway.routers.client import RouterClient
from microserve.gateway.state import GatewayState
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.protocol import log
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import Draining
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.settings import Settings

DRAIN_S = 9.0
"""Streams that run at a stop have so long to finish; supervisors kill after ten."""
MAX_BODIES = 16
"""Bodies of full size that may be held while they are read."""

_logger = structlog.get_logger()


class _ServerLog(logging.Handler):
    """uvicorn's own messages as events: about exceptions, else about clients that do not keep to HTTP."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            _logger.error(log.SERVICE_FAILED, detail=record.getMessage(), exc_info=record.exc_info)
        else:
            _logger.warning(log.HTTP_REJECTED, detail=record.getMessage())


@contextmanager
def _server_log() -> Iterator[None]:
    handler = _ServerLog(logging.WARNING)
    logger = logging.getLogger("uvicorn")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


async def run_gateway(
    settings: Settings, bus: ZmqBus, lifecycle: Lifecycle, *, drain_s: float = DRAIN_S
) -> None:
    """Serve until cancelled, then drain.

    Raises :class:`ConfigError` when the model or the address cannot be used.
    """
    tokenizer = ModelTokenizer.load(settings.model.path)
    try:
        await _serve(settings, tokenizer, bus, lifecycle, drain_s)
    finally:
        tokenizer.close()


async def _serve(
    settings: Settings, tokenizer: ModelTokenizer, bus: ZmqBus, lifecycle: Lifecycle, drain_s: float
) -> None:
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(bind(settings.gateway.host, settings.gateway.port))
        state = _make_state(settings, tokenizer, bus)
        stack.push_async_callback(state.routers.close)
        stack.enter_context(_server_log())
        beating = state.routers.start()
        app = with_cors(Application(state), settings.gateway.cors_origins)
        server = make_server(app, graceful_s=math.ceil(drain_s) + 1)
        serving = asyncio.create_task(server.serve([listener]), name="http server")
        try:
            lifecycle.set_health(lambda: not beating.done())
            lifecycle.ready(address_of(listener))
            done, _ = await asyncio.wait([serving, beating], return_when=asyncio.FIRST_COMPLETED)
            if beating in done:
                beating.result()  # without a heartbeat every router would give us up: better end
        finally:
            state.drain()
            server.should_exit = True
            await _drain(state, serving, drain_s)


def _make_state(settings: Settings, tokenizer: ModelTokenizer, bus: ZmqBus) -> GatewayState:
    gateway = settings.gateway
    model = settings.model.name or Path(settings.model.path).resolve().name
    routers = RouterClient(
        bus,
        gateway.routers or [settings.router.address],
        gateway_id=gateway.id,
        incarnation=secrets.randbelow((1 << 62) - 1) + 1,
        model=model,
        credit=settings.bus.credit,
        heartbeat_interval_s=settings.bus.heartbeat_interval_s,
        liveness=settings.bus.liveness,
        clock=time.monotonic,  # as for HTTP: uvloop's has milliseconds only
    )
    max_body_nbytes = gateway.max_body_mb << 20
    return GatewayState(
        model=model,
        version=version("microserve"),
        created=int(time.time()),
        tokenizer=tokenizer,
        bus=bus,
        routers=routers,
        keys=KeyRing(gateway.api_keys),
        bodies=BodyBudget(max_body_nbytes, MAX_BODIES * max_body_nbytes),
        metrics=GatewayMetrics(model, time.monotonic),
        max_n=gateway.max_n,
        max_choices=gateway.max_streams,
        request_timeout_s=gateway.request_timeout_s,
    )


async def _drain(state: GatewayState, serving: asyncio.Task[None], drain_s: float) -> None:
    """uvicorn takes no new connections by now; what runs may finish, what is left then is ended cleanly."""
    done, _ = await asyncio.wait([serving], timeout=drain_s)
    if not done:
        state.end_all(Draining("this gateway is shutting down; try again", retry_after_s=1.0))
    await serving
