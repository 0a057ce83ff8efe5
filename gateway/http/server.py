"""uvicorn as this gateway runs it: its socket, its protocol class and who handles signals.

Owns everything that depends on uvicorn. The application above it is plain ASGI.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import math
import socket
import ssl
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from microserve.gateway.http.accept import ACCEPTS_PER_TURN, Acceptor, room_for_connections
from microserve.gateway.http.exchange import ARRIVED_EXTENSION, CONNECTION_EXTENSION
from microserve.gateway.http.upgrade import PlainParser
from microserve.protocol.errors import ConfigError
from microserve.protocol.process.tick import until_tick

BACKLOG = 2048
KEEP_ALIVE_S = 65
SEND_BUFFER_NBYTES = 64 << 10
"""Kernel memory of a slow reader; more would only hide it (3 MB are the whole answers of most streams)."""
USER_TIMEOUT_MS = 30_000
"""A peer that vanished without a FIN is noticed after so long."""

DATE_S = 1.0
"""Age of the date in answers' headers, at most."""
HEAD_TIMEOUT_S = 30.0
SPARED_S = 1.0
"""A connection that has been silent for so long may have to make room for one that waits."""
MAX_HEAD_NBYTES = 512 << 10
"""More than one read brings, so that bytes behind a body in the same read do not count against a head."""


MAX_HEADERS = 256
"""A head of 512 KB would have room for 100,000, which hold the loop for a tenth of a second."""


class GatewayProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with bounds on a request's head, and with the connection itself for the handler."""

    _head_nbytes: int | None = None
    """Of the head that is on its way; None while none is awaited."""
    _is_whole = True
    """The current request has come with all of its body."""
    _silent_since = math.inf
    _timer: asyncio.TimerHandle | None = None
    """Closes a connection whose client has something to send and does not, whatever else it sends."""
    _tell_end: Callable[[], None] | None = None
    _has_ended = False
    asked_at: float | None = None
    """``time.monotonic`` when the connection was let in with its first request there to read."""

    @property
    def silent_since(self) -> float:
        """By the loop's clock: only the client could go on here since then; infinite while we answer."""
        is_ahead = self._head_nbytes is not None and self.cycle is not None  # with the head of its next one
        if self.pipeline or (is_ahead and not self.cycle.response_complete):
            return math.inf
        return self._silent_since

    @property
    def takes_more(self) -> bool:
        return not self.flow.write_paused

    def abort(self) -> None:
        self.transport.abort()

    def is_closing(self) -> bool:
        return self.transport.is_closing()

    def tell_end(self, tell: Callable[[], None]) -> None:
        self._tell_end = tell
        if self._has_ended:
            tell()
        else:
            self.flow.resume_reading()  # a large body may have paused it, and an end is read

    def tell_nobody(self, tell: Callable[[], None]) -> None:
        if self._tell_end is tell:
            self._tell_end = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.parser: PlainParser = PlainParser(self)  # type: ignore[assignment]
        self._await_head(HEAD_TIMEOUT_S)

    def _await_head(self, limit_s: float) -> None:
        self._await(limit_s)
        self._head_nbytes = 0

    def _await(self, limit_s: float) -> None:
        self._go_on()
        self._silent_since = self.loop.time()
        self._timer = self.loop.call_later(limit_s, self.transport.close)

    def _go_on(self) -> None:
        self._head_nbytes = None
        self._silent_since = math.inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_nbytes is not None:
            self._head_nbytes += len(data)
            if self._head_nbytes > MAX_HEAD_NBYTES:
                self.send_400_response("Request head too large.")
        elif not self._is_whole and self._timer is None:
            self._silent_since = self.loop.time()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            raise ValueError(f"more than {MAX_HEADERS} headers")  # the parser stops, and it is a 400

    def on_headers_complete(self) -> None:
        if not self.parser.wants_upgrade:
            self._go_on()
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.wants_upgrade:
            self._is_whole = True
            super().on_message_complete()
            if self.cycle.response_complete and not self.transport.is_closing():
                self._await_head(KEEP_ALIVE_S)
            else:
                self._go_on()

    def on_response_complete(self) -> None:
        """Nobody stays for ever by sending the rest of a body that was refused, or empty lines."""
        is_last = not self.pipeline
        super().on_response_complete()
        if is_last and self._head_nbytes is None and not self.transport.is_closing():
            if self._is_whole:
                self._await_head(KEEP_ALIVE_S)
            else:
                self._await(HEAD_TIMEOUT_S)

    def on_message_begin(self) -> None:
        self._await_head(HEAD_TIMEOUT_S)
        self._is_whole = False
        super().on_message_begin()
        arrived, self.asked_at = self.asked_at or monotonic(), None
        cast(dict[str, Any], self.scope)["extensions"] = {
            CONNECTION_EXTENSION: self,
            ARRIVED_EXTENSION: arrived,
        }

    def connection_lost(self, exc: Exception | None) -> None:
        self._go_on()
        super().connection_lost(exc)
        self._has_ended = True
        if self._tell_end is not None:
            self._tell_end()


class HttpServer(uvicorn.Server):
    """uvicorn's server without signal handlers: the process that owns it decides when to stop."""

    max_connections = 0
    """Open at a time; 0: as many as descriptors allow."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._news = asyncio.Event()
        """It is asked to exit, or somebody connects."""
        self._connected_at = -math.inf
        """By the loop's clock, the last time."""

    def stop(self) -> None:
        """Take no new connections, and end when those that are open have."""
        self.should_exit = True
        self._news.set()

    async def main_loop(self) -> None:
        """As uvicorn's, which looks ten times a second whether it has been stopped; the date in the headers
        is a second's, where anybody is connected to see it."""
        loop, connections = asyncio.get_running_loop(), self.server_state.connections
        while not await self.on_tick(0):
            is_seen = connections or loop.time() - self._connected_at < DATE_S
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                # In step with what else the process does every interval.
                async with asyncio.timeout(until_tick(loop.time(), DATE_S) if is_seen else None):
                    await self._news.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, but that connections are let in by :class:`Acceptor`."""
        await self.lifespan.startup()
        config, state = self.config, self.server_state
        loop = asyncio.get_running_loop()

        def make_protocol(asked_at: float | None) -> asyncio.Protocol:
            self._connected_at = loop.time()
            if not state.connections:
                self._news.set()
            protocol = GatewayProtocol(
                config=config, server_state=state, app_state=self.lifespan.state, _loop=loop
            )
            protocol.asked_at = asked_at
            return protocol

        self.servers: list[Any] = [
            Acceptor(
                listener,
                lambda accepted, asked_at: loop.connect_accepted_socket(
                    lambda: make_protocol(asked_at), accepted, ssl=config.ssl
                ),
                max_connections=room_for_connections(self.max_connections),
                num_open=lambda: len(state.connections),
                make_room=self._make_room,
            )
            for listener in sockets or []
        ]
        self.started = True

    def _make_room(self) -> None:
        """Close those that have been silent for longest, if for a while."""
        limit = asyncio.get_running_loop().time() - SPARED_S
        silent = [each for each in self.server_state.connections if isinstance(each, GatewayProtocol)]
        silent = [each for each in silent if each.silent_since < limit]
        silent.sort(key=lambda each: each.silent_since)
        for each in silent[:ACCEPTS_PER_TURN]:
            each.transport.close()


def bind(host: str, port: int, *, may_be_exposed: bool = True, is_shared: bool = False) -> socket.socket:
    """A listening socket with bounded buffers. ``is_shared``: other processes of this user listen at the
    same port, and the kernel deals connections out to all of them.

    Raises :class:`ConfigError` if the address cannot be had, or is open to other machines and must not be."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, number)
    except OSError as error:
        raise ConfigError(f"gateway.host {host}: {error}", field="gateway.host") from None
    if not (may_be_exposed or _is_loopback(str(address[0]))):
        listener.close()
        raise ConfigError(
            f"gateway.host {host} can be reached from other machines, and no API keys are set: make some "
            "('microserve key new', gateway.api_keys_file), or set gateway.allow_no_keys to serve everybody",
            field="gateway.host",
        )
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Accepted connections inherit these.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_NBYTES)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}", field="gateway.port") from None
    return listener


def _is_loopback(host: str) -> bool:
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback


def address_of(listener: socket.socket, *, scheme: str = "http") -> str:
    """``http://host:port`` with the port that the system chose."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def make_server(
    app: ASGIApp, *, graceful_s: int, tls: ssl.SSLContext | None = None, max_connections: int = 0
) -> HttpServer:
    """``graceful_s``: after it, a stopping server cancels handlers that still run. ``max_connections`` 0: as
    many as descriptors allow."""
    config = _config(app, graceful_s)
    config.load()
    config.ssl = tls
    server = HttpServer(config)
    server.max_connections = max_connections
    return server


def _config(app: ASGIApp, graceful_s: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=GatewayProtocol,
        ws="none",
        loop="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=graceful_s,
    )
