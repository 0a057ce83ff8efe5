"""A gateway: everything made, served and closed in order.

    socket, routers -> ready ... cancelled -> nothing new, streams finish, the rest is ended

Owns the order only; each part knows how it is made and closed, and ``protocol/process/run.py`` the process.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import structlog

from microserve.gateway.api.parse import Shape
from microserve.gateway.app import Application
from microserve.gateway.grammar.checker import GrammarChecker
from microserve.gateway.helper.helper import Helpers
from microserve.gateway.helper.jobs import Setup
from microserve.gateway.http.cors import with_cors
from microserve.gateway.http.exchange import BodyBudget
from microserve.gateway.http.server import address_of, bind, make_server
from microserve.gateway.http.tls import Certificate
from microserve.gateway.kept.shelf import Bounds
from microserve.gateway.kept.store import Store
from microserve.gateway.keys.key import ApiKey, plain_keys
from microserve.gateway.keys.ledger import Ledger
from microserve.gateway.keys.quota import Quotas
from microserve.gateway.keys.reader import KeyReader
from microserve.gateway.keys.ring import KeyRing
from microserve.gateway.keys.usage import DAY_S, UsageBook
from microserve.gateway.metrics import GatewayMetrics
from microserve.gateway.parsing.parsers import ModelParsers, signs_of
from microserve.gateway.request.attributes import Attributes
from microserve.gateway.request.defaults import SamplingDefaults
from microserve.gateway.routers.client import RouterClient
from microserve.gateway.siblings import Siblings
from microserve.gateway.state import GatewayState
from microserve.gateway.text.prompt.chat_template import read_json
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.gateway.view.feed import Feed
from microserve.gateway.view.index import IndexLink
from microserve.gateway.view.mesh import Mesh
from microserve.gateway.view.requests import Requests
from microserve.gateway.view.view import ASKED_ONE, ASKED_REQUESTS, ASKED_SINCE, View
from microserve.gateway.worker import share
from microserve.protocol import log
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import Draining
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.settings.settings import Settings

BODY_DRAIN_S = 1.0
"""Bodies that are being read at a stop have so long to be complete; then their clients are told of it."""
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
    settings: Settings,
    bus: ZmqBus,
    lifecycle: Lifecycle,
    *,
    drain_s: float | None = None,
    worker: int | None = None,
) -> None:
    """Serve until cancelled, then drain. ``worker``: which of ``gateway.workers`` processes that share the
    port this is; None: it has the port for itself. ``drain_s`` None: ``gateway.drain_s``.

    Raises :class:`ConfigError` when the model or the address cannot be used.
    """
    async with AsyncExitStack() as stack:
        helpers = _make_helpers(settings)
        stack.push_async_callback(helpers.close)
        tokenizer = ModelTokenizer.load(
            settings.model.path,
            renderer=helpers.render,
            parse_control_tokens=settings.gateway.parse_control_tokens,
        )
        stack.callback(tokenizer.close)
        drain_s = settings.gateway.drain_s if drain_s is None else drain_s
        await _serve(settings, tokenizer, helpers, bus, lifecycle, drain_s, worker)


def _make_helpers(settings: Settings) -> Helpers:
    gateway = settings.gateway
    return Helpers(
        Setup(
            directory=os.path.abspath(settings.model.path),
            model=_model_name(settings),
            template_cpu_s=gateway.template_cpu_s,
            max_values=gateway.max_body_values,
            max_depth=gateway.max_body_depth,
            parse_control_tokens=gateway.parse_control_tokens,
        )
    )


def _model_name(settings: Settings) -> str:
    return settings.model.name or Path(settings.model.path).resolve().name


async def _serve(
    settings: Settings,
    tokenizer: ModelTokenizer,
    helpers: Helpers,
    bus: ZmqBus,
    lifecycle: Lifecycle,
    drain_s: float,
    worker: int | None,
) -> None:
    gateway = settings.gateway
    async with AsyncExitStack() as stack:
        plain = plain_keys(gateway.api_keys)
        reader = KeyReader(gateway.api_keys_file) if gateway.api_keys_file else None
        keys = KeyRing([*plain, *reader.read()] if reader else plain or None)
        listener = stack.enter_context(
            bind(
                gateway.host,
                gateway.port,
                may_be_exposed=gateway.allow_no_keys or not keys.is_open,
                is_shared=worker is not None,
            )
        )
        certificate = Certificate(gateway.tls_cert, gateway.tls_key) if gateway.tls_cert else None
        url = address_of(listener, scheme="https" if certificate else "http")
        state = _make_state(settings, tokenizer, helpers, bus, keys, worker, url)
        if worker is not None:
            siblings = state.siblings = Siblings(
                address_of(listener), worker, gateway.workers, state.own_families
            )
            siblings.answers(ASKED_REQUESTS, partial(state.view.answer, ASKED_REQUESTS))
            siblings.answers(ASKED_SINCE, partial(state.view.answer, ASKED_SINCE))
            siblings.answers(ASKED_ONE, partial(state.view.answer, ASKED_ONE))
            state.view.ask_siblings = siblings.ask
            await siblings.start()
            stack.push_async_callback(siblings.close)
        stack.push_async_callback(state.routers.close)
        if gateway.view_requests:
            _watch_mesh(stack, settings, state)
        stack.enter_context(_server_log())
        if gateway.responses_path:
            bounds = Bounds(
                gateway.responses_mb << 20, gateway.responses_count, gateway.responses_days * DAY_S
            )
            state.store = Store(gateway.responses_path, bounds, time.time)
            stack.push_async_callback(state.store.close)
        if gateway.usage_path:
            # Only keys of a file have budgets.
            ledger = Ledger(gateway.usage_path, state.quotas.book, time.time, asks_others=reader is not None)
            ledger.start()
            stack.push_async_callback(ledger.close)
        if reader is not None:
            _watch_keys(stack, state, reader, plain)
        lifecycle.on_reload(lambda new: _reload(new, state.keys, plain, reader, certificate))
        lag = asyncio.create_task(state.metrics.lag.watch(), name="loop lag")
        stack.callback(lag.cancel)
        beating = state.routers.start()
        server = make_server(
            with_cors(Application(state), gateway.cors_origins),
            graceful_s=math.ceil(drain_s) + 1,
            tls=certificate.context if certificate else None,
            max_connections=gateway.max_connections,
        )
        serving = asyncio.create_task(server.serve([listener]), name="http server")
        try:
            lifecycle.set_health(lambda: not beating.done())
            about = f"one of {gateway.workers} workers" if worker is not None else ""
            lifecycle.ready(url, about=about)
            done, _ = await asyncio.wait([serving, beating], return_when=asyncio.FIRST_COMPLETED)
            if beating in done:
                beating.result()  # without a heartbeat every router would give us up: better end
        finally:
            state.drain()
            server.stop()
            await _drain(state, serving, drain_s)


def _reload(
    settings: Settings,
    keys: KeyRing,
    plain: list[ApiKey],
    reader: KeyReader | None,
    certificate: Certificate | None,
) -> None:
    """SIGHUP: other keys, and what the files of keys and certificate hold now; which files they are, stays. A
    gateway whose last key is taken away lets nobody in: it does not come open while it runs."""
    plain[:] = plain_keys(settings.gateway.api_keys)
    if reader is not None:
        reader.ask()
    elif plain or not keys.is_open:
        keys.replace(plain)
    if certificate is not None:
        certificate.reload()


def _watch_keys(stack: AsyncExitStack, state: GatewayState, reader: KeyReader, plain: list[ApiKey]) -> None:
    """Take every new set of keys over, until the stack is closed."""

    def take(named: list[ApiKey]) -> None:
        state.keys.replace([*plain, *named])
        state.quotas.keep_only([*plain, *named])

    watching = asyncio.create_task(reader.watch(take), name="keys")
    stack.callback(watching.cancel)


def _watch_mesh(stack: AsyncExitStack, settings: Settings, state: GatewayState) -> None:
    """Hear of the mesh what the index says, until the stack is closed."""
    link = state.view.link = IndexLink(
        state.bus,
        settings.index.address,
        state.view.mesh,
        gateway_id=settings.gateway.id,
        interval_s=settings.bus.heartbeat_interval_s,
        clock=time.monotonic,
    )
    stack.callback(link.close)
    watching = asyncio.create_task(link.run(), name="view of the mesh")
    stack.callback(watching.cancel)


def _make_view(settings: Settings, worker: int | None) -> View:
    bus, gateway = settings.bus, settings.gateway
    return View(
        Requests(share(gateway.view_requests, gateway.workers) if gateway.view_requests else 0),
        Mesh(time.monotonic(), silence_s=bus.heartbeat_interval_s * bus.liveness),
        Feed(secrets.token_hex(4)),
        clock=time.monotonic,
        wall_clock=time.time,
        number=worker or 0,
    )


def _make_state(
    settings: Settings,
    tokenizer: ModelTokenizer,
    helpers: Helpers,
    bus: ZmqBus,
    keys: KeyRing,
    worker: int | None,
    url: str,
) -> GatewayState:
    gateway = settings.gateway
    attributes = Attributes.of(gateway.attributes, gateway.private_attributes)
    model = _model_name(settings)
    defaults = SamplingDefaults()
    if gateway.generation_config:
        defaults = SamplingDefaults.of_model(settings.model.path)
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
        url=url,
    )
    helpers.adapters = lambda: routers.known_adapters
    max_body_nbytes = gateway.max_body_mb << 20
    return GatewayState(
        model=model,
        version=version("microserve"),
        created=int(time.time()),
        tokenizer=tokenizer,
        parsers=_make_parsers(settings, tokenizer),
        helpers=helpers,
        grammars=GrammarChecker(helpers.check),
        bus=bus,
        routers=routers,
        keys=keys,
        quotas=Quotas(UsageBook(), clock=time.monotonic, wall_clock=time.time),
        bodies=BodyBudget(max_body_nbytes, share(MAX_BODIES, gateway.workers) * max_body_nbytes),
        defaults=defaults,
        shape=Shape(gateway.max_body_values, gateway.max_body_depth),
        metrics=GatewayMetrics(model, time.monotonic),
        dtype=settings.model.dtype,
        weights=settings.model.weights,
        max_n=gateway.max_n,
        max_choices=gateway.max_streams,
        request_timeout_s=gateway.request_timeout_s,
        view=_make_view(settings, worker),
        shared_prefix_cache=gateway.shared_prefix_cache,
        attributes=attributes,
    )


def _make_parsers(settings: Settings, tokenizer: ModelTokenizer) -> ModelParsers:
    template = "" if tokenizer.template is None else tokenizer.template.sources
    shipped = read_json(Path(settings.model.path) / "tokenizer_config.json").get("response_template")
    wanted, thoughts = settings.model.tool_parser, settings.model.reasoning_parser
    parsers = ModelParsers.of_model(signs_of(template, shipped), wanted, thoughts, tokenizer.added_id)
    if shipped is not None and wanted == "auto" and parsers.tools is None:
        _logger.warning(
            log.MODEL_RESPONSE_TEMPLATE_UNKNOWN,
            detail="the model's response_template is of no family that is known here: calls stay text, and "
            "tools are refused, unless model.tool_parser names one",
        )
    return parsers


async def _drain(state: GatewayState, serving: asyncio.Task[None], drain_s: float) -> None:
    """uvicorn takes no new connections by now; what runs may finish, what is left then is ended cleanly."""
    error = Draining("this gateway is shutting down; try again", retry_after_s=1.0)
    # A body that is still to come would be refused when it is here.
    loop = asyncio.get_running_loop()
    late = loop.call_later(min(BODY_DRAIN_S, drain_s), state.bodies.end, error)
    done, _ = await asyncio.wait([serving], timeout=drain_s)
    if not done:
        state.end_all(error)
    await serving
    late.cancel()
