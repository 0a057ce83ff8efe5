"""HTTP/1.1 as a client: connections that are kept, and whoever listens is told what comes when it comes.

Owns sockets and framing. Cheap on purpose, since a load generator is measured with it: a parser in C, no
queue and no task between the socket and who listens.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Mapping
from typing import Protocol, cast

import httptools

from microserve.services.command.client.endpoint import Endpoint


class Listener(Protocol):
    """Who gets an answer. Raises nothing: there is nobody to catch it."""

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        """Names in small letters. Once."""

    def body(self, data: bytes) -> None:
        """A piece of the body, without its framing."""

    def end(self, fault: str) -> None:
        """The answer is over, once; ``fault``: why before its end, empty if it is whole."""


class _Connection(asyncio.Protocol):
    """One exchange at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._listener: Listener | None = None
        self._over: asyncio.Future[bool] | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._transport: asyncio.Transport | None = None
        self._headers: dict[str, str] = {}
        self._heard = False
        self._in_body = False
        self.is_open = False
        self.lost: asyncio.Future[None] = loop.create_future()

    async def exchange(self, request: bytes, listener: Listener) -> bool:
        """False: it had been closed, and not a byte came back."""
        assert self._transport is not None and self._listener is None
        self._listener, self._over = listener, self._loop.create_future()
        self._heard = self._in_body = False
        self._headers = {}
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(request)
        return await self._over

    def close(self) -> None:
        self.is_open = False
        self._listener = None
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self.is_open = cast(asyncio.Transport, transport), True

    def data_received(self, data: bytes) -> None:
        if self._listener is None or self._parser is None:
            return self.close()  # nobody has asked
        self._heard = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish(f"the server does not speak HTTP: {error}")
            self.close()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if not self.lost.done():
            self.lost.set_result(None)
        if self._over is not None and not self._over.done() and not self._heard:
            self._listener = None
            self._over.set_result(False)
        elif self._in_body and not {"content-length", "transfer-encoding"} & self._headers.keys():
            self._finish("")  # such a body ends with its connection
        else:
            self._finish("the connection was closed before the answer's end")

    def _finish(self, fault: str) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.end(fault)
        if self._over is not None and not self._over.done():
            self._over.set_result(True)

    # --- httptools ---------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        self._in_body = status >= 200
        if self._in_body and self._listener is not None:
            self._listener.head(status, self._headers)

    def on_body(self, data: bytes) -> None:
        if self._listener is not None:
            self._listener.body(data)

    def on_message_complete(self) -> None:
        if not self._in_body:  # 100 Continue and its like
            self._headers = {}
            return
        assert self._parser is not None
        self.is_open = self.is_open and self._parser.should_keep_alive()
        self._finish("")
        if not self.is_open:
            self.close()


class Client:
    """Connections to one server; make it in a running loop and ``close`` it."""

    def __init__(self, endpoint: Endpoint, *, connect_timeout_s: float = 10.0) -> None:
        self.endpoint = endpoint
        self._tls: ssl.SSLContext | None = endpoint.tls()
        self._loop = asyncio.get_running_loop()
        self._connect_timeout_s = connect_timeout_s
        self._all: set[_Connection] = set()
        self._kept: list[_Connection] = []

    async def close(self) -> None:
        """Returns when they are closed: a loop of libuv that ends before a TLS connection does hangs."""
        for connection in [*self._all]:
            connection.close()
        if self._all:
            await asyncio.wait([connection.lost for connection in self._all])
        self._all.clear()
        self._kept.clear()

    async def exchange(self, request: bytes, listener: Listener) -> None:
        """Until the answer is over; cancelled: the connection is closed, so the server learns of it.

        ``listener.end`` is told of a connection that cannot be had, too. A kept connection that its server
        has closed meanwhile is replaced by a new one.
        """
        while True:
            connection = self._take()
            is_new = connection is None
            if connection is None:
                try:
                    connection = await self._connect()
                except OSError as error:
                    reason = _reason_of(error)
                    return listener.end(f"cannot connect to {self.endpoint.url}: {reason}")
            try:
                answered = await connection.exchange(request, listener)
            except asyncio.CancelledError:
                connection.close()
                raise
            if connection.is_open:
                self._kept.append(connection)
            if answered:
                return None
            if is_new:
                return listener.end("the connection was closed without an answer")

    async def fetch(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body of a whole answer. Raises :class:`ConnectionError` that says why there is none."""
        whole = _Whole()
        await self.exchange(self.endpoint.request(method, path, body), whole)
        if whole.fault:
            raise ConnectionError(whole.fault)
        return whole.status, bytes(whole.content)

    def _take(self) -> _Connection | None:
        while self._kept:
            connection = self._kept.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self) -> _Connection:
        async with asyncio.timeout(self._connect_timeout_s):
            _, connection = await self._loop.create_connection(
                lambda: _Connection(self._loop), self.endpoint.host, self.endpoint.port, ssl=self._tls
            )
        self._all.add(connection)
        connection.lost.add_done_callback(lambda _: self._all.discard(connection))
        return connection


def _reason_of(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message}"
    number = 0 if isinstance(error, ssl.SSLError) else error.errno or 0  # theirs are numbers of their own
    return os.strerror(number) if number > 0 else error.strerror or str(error) or "no answer"


class _Whole:
    def __init__(self) -> None:
        self.status, self.content, self.fault = 0, bytearray(), ""

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status

    def body(self, data: bytes) -> None:
        self.content += data

    def end(self, fault: str) -> None:
        self.fault = fault
