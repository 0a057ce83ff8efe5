"""One HTTP request and its answer, above raw ASGI: headers, a bounded body, disconnection, one JSON reply.

Owns the ASGI callables of one request; knows nothing of models or the bus. From the end of the body on the
connection tells of its end, for streamed and for plain answers alike: a task that waits for ``receive`` would
say the same and cost each request more. A client that half-closes its side counts as gone.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol

import structlog
from starlette.types import Message, Receive, Scope, Send

from microserve.gateway.http.errors import (
    BodyTimeout,
    BodyTooLarge,
    ClientGone,
    MethodNotAllowed,
    Problem,
    problem_of,
)
from microserve.gateway.keys.key import ANONYMOUS, ApiKey
from microserve.gateway.keys.quota import Visit
from microserve.protocol import log
from microserve.protocol.errors import InternalError, InvalidRequest, MeshError, QueueFull
from microserve.protocol.request_id import unique

BODY_TIMEOUT_S = 60.0
MIN_TIMEOUT_S = 0.001
"""That a client may ask for."""
MAX_WARNING_CHARS = 1024
"""Of a header."""
CONNECTION_EXTENSION = "microserve.connection"
"""ASGI extension of our server: what is under the request (:class:`Connection`)."""
ARRIVED_EXTENSION = "microserve.arrived"
"""ASGI extension of our server: ``time.monotonic`` when the request began to come."""

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_UNSAFE_IN_HEADER = re.compile(r"[^\x20-\x7e]")
_JSON = (b"content-type", b"application/json")
_logger = structlog.get_logger()


class Connection(Protocol):
    """What a handler may ask of the connection itself."""

    def abort(self) -> None: ...
    def is_closing(self) -> bool: ...
    def tell_end(self, tell: Callable[[], None]) -> None:
        """``tell`` is called when the connection ends, at once if it has; the last one who asks is told."""
        ...

    def tell_nobody(self, tell: Callable[[], None]) -> None:
        """If it was ``tell`` that would have been called, nobody is."""
        ...

    @property
    def takes_more(self) -> bool:
        """What is written now does not have to wait for the client."""
        ...


class BodyBudget:
    """Bytes of bodies that all requests together may hold, from their first byte until they are tokenised."""

    def __init__(self, max_body_nbytes: int, max_total_nbytes: int) -> None:
        self.max_body_nbytes = max_body_nbytes
        self.max_total_nbytes = max_total_nbytes
        self.held_nbytes = 0
        self._ended: MeshError | None = None
        self._reading: set[asyncio.Timeout] = set()
        """The time limits of those that are being read."""

    @contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        """Count a body that has been read, until nothing needs it any more. Raises :class:`QueueFull`."""
        self.held_nbytes += nbytes
        try:
            self.check()
            yield
        finally:
            self.held_nbytes -= nbytes

    def end(self, error: MeshError) -> None:
        """Bodies that are not here yet come too late: who reads one is told ``error``."""
        self._ended = error
        now = asyncio.get_running_loop().time()
        for timeout in self._reading:
            timeout.reschedule(now)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Around the reading of one body. Raises :class:`BodyTimeout`, or what :meth:`end` was given."""
        timeout = asyncio.timeout(BODY_TIMEOUT_S)
        try:
            async with timeout:
                if self._ended is not None:
                    raise self._ended
                self._reading.add(timeout)
                yield
        except TimeoutError:
            raise self._ended or BodyTimeout(
                f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s"
            ) from None
        finally:
            self._reading.discard(timeout)

    def check(self) -> None:
        """Raises :class:`QueueFull` when bodies hold more than they may."""
        if self.held_nbytes > self.max_total_nbytes:
            raise QueueFull("too many large requests at a time", retry_after_s=1.0)


class Exchange:
    """One request; made by the application, used by one handler."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.arrived: float = scope["extensions"][ARRIVED_EXTENSION]
        """``time.monotonic`` when the request began to come."""
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.status = 0
        """0 until the answer has begun."""
        self.started = False
        self.complete = False
        self._receive = receive
        self._send = send
        self._connection: Connection = scope["extensions"][CONNECTION_EXTENSION]
        self._headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.query: bytes = scope.get("query_string", b"")
        self.path_params: Mapping[str, Any] = {}
        self.key: ApiKey = ANONYMOUS
        """Whose request it is; set when its key has been checked."""
        self.visit: Visit | None = None
        """What it takes of its key's limits; only where it costs something."""
        self.problem_of: Callable[[MeshError], Problem] = problem_of
        """How errors are told: the API's whose path it is."""
        self.limits: Callable[[], Mapping[str, str]] = dict
        """Headers that tell of the key's limits, as of the moment that the answer begins."""
        given = self.text_header(b"x-request-id")
        usable = given is not None and _SANE_ID.fullmatch(given) is not None
        self.request_id: str = given if given is not None and usable else secrets.token_hex(16)
        """Echoed as ``x-request-id``: the client's own if it is a sane one."""
        self.unique_id = unique(self.request_id) if usable else self.request_id
        self.id_headers: tuple[bytes, ...] = (b"x-request-id",)
        """By which the answer says its id."""

    def header(self, name: bytes) -> bytes | None:
        """First value of a header; ``name`` in lower case."""
        for key, value in self._headers:
            if key == name:
                return value
        return None

    def only_header(self, name: bytes) -> bytes | None:
        """Value of a header that comes once; None where it does not, or comes more often."""
        values = [value for key, value in self._headers if key == name]
        return values[0] if len(values) == 1 else None

    def text_header(self, name: bytes) -> str | None:
        value = self.header(name)
        return None if value is None else value.decode("latin-1")

    async def read_body(self, budget: BodyBudget) -> bytes:
        """The whole body.

        Raises :class:`BodyTooLarge`, :class:`BodyTimeout`, :class:`ClientGone`, :class:`QueueFull` while too
        many other bodies are being read, or what the budget was ended with.
        """
        encoding = self.header(b"content-encoding")
        if encoding not in (None, b"", b"identity"):
            raise InvalidRequest("a body must come without content-encoding", field="content-encoding")
        declared = self.header(b"content-length")
        # A header of thousands of digits is no number that int() should be asked to read.
        if declared is not None and (len(declared) > 18 or int(declared) > budget.max_body_nbytes):
            raise _too_large(budget)
        body = bytearray()
        try:
            async with budget.reading():
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone("the client went while sending its request")
                    part: bytes = message.get("body", b"")
                    body += part
                    budget.held_nbytes += len(part)
                    if len(body) > budget.max_body_nbytes:
                        raise _too_large(budget)
                    budget.check()
                    if not message.get("more_body", False):
                        return bytes(body)
        finally:
            budget.held_nbytes -= len(body)

    @contextmanager
    def watch(self, on_gone: Callable[[MeshError], None]) -> Iterator[None]:
        """Inside, ``on_gone`` is called with :class:`ClientGone` the moment that the client closes."""

        def tell() -> None:
            if not self.complete:
                on_gone(ClientGone("the client closed the connection"))

        self._connection.tell_end(tell)
        try:
            yield
        finally:
            self._connection.tell_nobody(tell)

    async def start(self, status: int, headers: Mapping[str, str], *extra: tuple[bytes, bytes]) -> None:
        """Send the head of the answer."""
        self.started = True
        self.status = status
        encoded = [(name.encode(), _header_value(value)) for name, value in headers.items()]
        encoded += [(name, self.request_id.encode()) for name in self.id_headers]
        encoded += [(name.encode(), value.encode()) for name, value in self.limits().items()]
        await self._emit({"type": "http.response.start", "status": status, "headers": [*encoded, *extra]})

    async def write(self, body: bytes, *, more: bool) -> None:
        """Send a part of the answer; waits while the client does not read."""
        if not more:
            self.complete = True
        await self._emit({"type": "http.response.body", "body": body, "more_body": more})

    @property
    def takes_more(self) -> bool:
        """The answer has begun, and :meth:`write_now` may be called."""
        return self.started and self._connection.takes_more

    def write_now(self, body: bytes) -> None:
        """As :meth:`write`, of a part that is not the last, without waiting: only if :attr:`takes_more`."""
        sending = self._send({"type": "http.response.body", "body": body, "more_body": True})
        try:
            if next(sending.__await__(), None) is not None:
                raise InternalError("a connection that takes more has made a write wait")
        except RuntimeError:
            self._raise_if_gone()
            raise

    async def _emit(self, message: Message) -> None:
        try:
            await self._send(message)
        except RuntimeError:
            self._raise_if_gone()
            raise

    def _raise_if_gone(self) -> None:
        """uvloop raises for a transport that has closed and has not told its protocol yet."""
        if self._connection.is_closing():
            raise ClientGone("the client closed the connection") from None

    async def reply(
        self, status: int, body: bytes, headers: Mapping[str, str] | None = None, *, kind: bytes | None = None
    ) -> None:
        """The whole answer at once; JSON unless ``kind`` names another content type."""
        content_type = _JSON if kind is None else (b"content-type", kind)
        length = (b"content-length", str(len(body)).encode())
        await self.start(status, headers or {}, content_type, length)
        await self.write(body, more=False)

    async def reply_empty(self, headers: Mapping[str, str]) -> None:
        """204: all that there is to say is in the headers."""
        await self.start(204, headers)
        await self.write(b"", more=False)

    async def answer(self, handler: Callable[[], Awaitable[None]]) -> MeshError | None:
        """Run what answers this request. The error that it ended with, of which the client has been told.

        Every error becomes an answer here, and nowhere else; only cancellation passes through.
        """
        failure: MeshError
        try:
            await handler()
        except MeshError as error:
            failure = error
        except Exception:
            _logger.exception(log.SERVICE_FAILED, http_request_id=self.request_id)
            failure = InternalError("internal error; the gateway's log has it under this request's id")
        else:
            return None
        await self.refuse(failure)
        return failure

    async def refuse(self, error: MeshError) -> None:
        """Answer with an error, if the answer has not begun and anybody is left to read it."""
        if self.started or isinstance(error, ClientGone):
            self.status = self.status or self.problem_of(error).status
            return
        problem = self.problem_of(error)
        headers = {} if problem.retry_after_s is None else {"retry-after": str(problem.retry_after_s)}
        if problem.status == 401:
            headers["www-authenticate"] = "Bearer"
        if isinstance(error, MethodNotAllowed):
            headers["allow"] = error.allow
        await self.reply(problem.status, problem.envelope(), headers)

    def abort(self) -> None:
        """Drop the connection with its buffers: closing would wait for a client that does not read."""
        self._connection.abort()


def timeout_of(exchange: Exchange, longest_s: float) -> float:
    """Seconds that the client allows (``x-microserve-timeout-s``), never more than ``longest_s``."""
    text = exchange.text_header(b"x-microserve-timeout-s")
    if text is None:
        return longest_s
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds >= MIN_TIMEOUT_S:  # NaN as well
        raise InvalidRequest(
            f"x-microserve-timeout-s must be a number of at least {MIN_TIMEOUT_S}",
            field="x-microserve-timeout-s",
        )
    return min(seconds, longest_s)


def warning_header(warnings: Sequence[str]) -> dict[str, str]:
    """What was asked for and is not done as asked, in one header; empty where there is nothing to tell."""
    return {"x-microserve-warning": "; ".join(warnings)[:MAX_WARNING_CHARS]} if warnings else {}


def strategy_of(exchange: Exchange) -> str | None:
    """The strategy that the client asks for (``x-microserve-strategy``); None: the router's default."""
    name = exchange.text_header(b"x-microserve-strategy")
    if name is not None and _SANE_ID.fullmatch(name) is None:
        raise InvalidRequest("x-microserve-strategy is not a name", field="x-microserve-strategy")
    return name


def exact_of(exchange: Exchange) -> bool | None:
    """What the client says of KV that loses something on its way (``x-microserve-exact``): ``true`` forbids
    it, ``false`` permits it; None: its key says, or the strategy."""
    text = exchange.text_header(b"x-microserve-exact")
    if text not in (None, "true", "false"):
        raise InvalidRequest("x-microserve-exact must be true or false", field="x-microserve-exact")
    return None if text is None else text == "true"


def _too_large(budget: BodyBudget) -> BodyTooLarge:
    return BodyTooLarge(f"the body is longer than {budget.max_body_nbytes} bytes")


def _header_value(value: Any) -> bytes:
    return _UNSAFE_IN_HEADER.sub("?", str(value)).encode("ascii")
