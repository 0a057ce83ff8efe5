"""The ASGI application: which path does what, who may, and a line for every request that was refused.

Owns routes and keys; what a route does is elsewhere. Starlette only finds the route: bodies, replies and
streams are ours.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import structlog
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from microserve.gateway.dialects import CHAT, COMPLETIONS, MESSAGES, RESPONSES, manners_of
from microserve.gateway.generation.completion import Completion
from microserve.gateway.http.errors import (
    ClientGone,
    Forbidden,
    MethodNotAllowed,
    PathNotFound,
)
from microserve.gateway.http.exchange import Exchange
from microserve.gateway.keys.usage import Counts
from microserve.gateway.route import operator_routes, page_routes, response_routes, view_routes, worker_routes
from microserve.gateway.state import GatewayState
from microserve.protocol import log

Handler = Callable[[GatewayState, Exchange], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/ready", "/"})
"""What probes need, and the page, without a key; so are the page's files (``/page/``), which say nothing of
the mesh. Everything else is behind a key if there are any."""
OPERATOR_PATHS = frozenset({"/metrics"})
"""What tells of all keys: for those of operators. So is everything under ``/view``."""

NUM_HOT = 4
"""Routes at the head of the table, without parameters."""

_EXCHANGE = "microserve.exchange"
_logger = structlog.get_logger()


async def _chat(state: GatewayState, exchange: Exchange) -> None:
    await Completion(state, exchange, CHAT).run()


async def _completions(state: GatewayState, exchange: Exchange) -> None:
    await Completion(state, exchange, COMPLETIONS).run()


async def _responses(state: GatewayState, exchange: Exchange) -> None:
    await Completion(state, exchange, RESPONSES).run()


async def _messages(state: GatewayState, exchange: Exchange) -> None:
    await Completion(state, exchange, MESSAGES).run()


class _Endpoint:
    """ASGI callable of one path: checks the method and runs the handler."""

    def __init__(self, state: GatewayState, methods: Iterable[str], handler: Handler) -> None:
        self._state = state
        self._methods = frozenset(methods)
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope[_EXCHANGE]
        if exchange.method not in self._methods:
            allowed = ", ".join(sorted(self._methods))
            if exchange.method == "OPTIONS":
                await exchange.reply_empty({"allow": f"{allowed}, OPTIONS"})
                return
            raise MethodNotAllowed(
                f"{exchange.path[:128]} takes {allowed}, not {exchange.method}", allow=f"{allowed}, OPTIONS"
            )
        exchange.path_params = scope.get("path_params", {})
        await self._handler(self._state, exchange)


class Application:
    """Raw ASGI; a request that raises becomes an error envelope, never a dead connection."""

    def __init__(self, state: GatewayState) -> None:
        self._state = state
        page_routes.files()  # now, and not on the first request's time
        routes = self._routes()
        self._router = Router(routes, redirect_slashes=False, default=self._no_route)
        self._hot = {route.path: route.endpoint for route in routes[:NUM_HOT]}

    def _routes(self) -> list[Route]:
        get, post = ("GET", "HEAD"), ("POST",)
        # The hot ones first: they are found without the router.
        table: list[tuple[str, tuple[str, ...], Handler]] = [
            ("/v1/chat/completions", post, _chat),
            ("/v1/completions", post, _completions),
            ("/v1/responses", post, _responses),
            ("/v1/responses/{response_id}", (*get, "DELETE"), response_routes.response),
            ("/v1/responses/{response_id}/input_items", get, response_routes.input_items),
            ("/v1/messages", post, _messages),
            ("/v1/messages/count_tokens", post, operator_routes.count_tokens),
            ("/v1/models", get, operator_routes.models),
            ("/v1/models/{model_id:path}", get, operator_routes.model),
            ("/health", get, operator_routes.health),
            ("/ready", get, operator_routes.ready),
            ("/metrics", get, operator_routes.metrics),
            ("/version", get, operator_routes.version),
            ("/openapi.json", get, operator_routes.openapi),
            ("/tokenize", post, operator_routes.tokenize),
            ("/detokenize", post, operator_routes.detokenize),
            ("/tokenizer_info", get, operator_routes.tokenizer_info),
            ("/view/mesh", get, view_routes.mesh),
            ("/view/requests", get, view_routes.requests),
            ("/view/requests/{request_id:path}", get, view_routes.request),
            ("/view/strategies", get, view_routes.strategies),
            ("/view/keys", get, view_routes.keys),
            ("/view/health", get, view_routes.health),
            ("/view/feed", get, view_routes.feed),
            ("/", get, page_routes.index),
            ("/page/{name:path}", get, page_routes.file),
            ("/server_info", get, worker_routes.server_info),
            ("/get_server_info", get, worker_routes.server_info),
            ("/model_info", get, worker_routes.model_info),
            ("/get_model_info", get, worker_routes.model_info),
            ("/flush_cache", (*get, "POST"), worker_routes.flush_cache),
        ]
        return [Route(path, _Endpoint(self._state, methods, handler)) for path, methods, handler in table]

    async def _no_route(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise PathNotFound(f"there is no {scope['path'][:128]} here")

    async def _handle(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        """Who asks, whether they may, and what it takes of their limits; then the path's handler."""
        state = self._state
        if exchange.path in OPEN_PATHS or exchange.path.startswith("/page/"):
            await self._router(scope, receive, send)
            return
        key = exchange.key = state.keys.check(
            exchange.header(b"authorization"), exchange.header(b"x-api-key")
        )
        exchange.limits = lambda: state.quotas.headers(key)
        is_operators = exchange.path in OPERATOR_PATHS or exchange.path.startswith("/view/")
        if is_operators and not key.operator:
            raise Forbidden(f"key {key.name!r} is not an operator's")
        if exchange.method != "POST":
            await self._router(scope, receive, send)
            return
        # Before the body: what is beyond a key's limits must cost others nothing.
        visit = exchange.visit = state.quotas.enter(key)
        try:
            await self._hot.get(exchange.path, self._router)(scope, receive, send)
        finally:
            state.quotas.settle(visit, Counts(requests=1))  # a completion has said what it used

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"unexpected ASGI scope {scope['type']!r}")
        exchange = Exchange(scope, receive, send)
        manners = manners_of(exchange.path)
        exchange.problem_of, exchange.id_headers = manners.problem_of, manners.id_headers
        scope[_EXCHANGE] = exchange

        failure = await exchange.answer(lambda: self._handle(exchange, scope, receive, send))
        # A completion answers its own errors and has a line of its own: none of them comes here.
        if failure is not None and not isinstance(failure, ClientGone):
            _logger.info(
                log.HTTP_REJECTED,
                http_request_id=exchange.request_id,
                method=exchange.method,
                path=exchange.path[:128],
                status=exchange.problem_of(failure).status,
                code=failure.code,
                key=exchange.key.name,
            )
