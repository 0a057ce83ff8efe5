"""``EventStream``: server-sent events over raw ASGI, pings while nothing comes, an end to stalled writes.

Owns the framing and the clock of one stream; what the events say is the caller's. The answer's head is held
back until the first event, so that a refused request still gets its own status; the first ping gives that up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from microserve.gateway.http.errors import ClientStalled
from microserve.gateway.http.exchange import Exchange
from microserve.protocol.errors import MeshError

PING_S = 15.0
"""Without an event for so long, a comment is sent: proxies and vanished peers."""
STALL_S = 30.0
"""A write that waits longer for the client is given up."""

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
_CONTENT_TYPE = (b"content-type", b"text/event-stream; charset=utf-8")
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def event(data: bytes) -> bytes:
    """One event of one line (JSON has no raw line breaks)."""
    return b"data: " + data + b"\n\n"


class EventStream:
    """One stream; use as ``async with`` and ``close`` it at the end of the last event."""

    def __init__(
        self,
        exchange: Exchange,
        *,
        on_idle: Callable[[], None],
        on_stall: Callable[[MeshError], None],
        headers: Callable[[], Mapping[str, str]] = dict,
        ping_s: float | None = None,
        stall_s: float | None = None,
    ) -> None:
        """``on_idle``: no write for ``ping_s``, so ``ping``. ``on_stall``: the client does not read.
        ``headers``: of the head, asked when that is sent."""
        self._exchange = exchange
        self._on_idle = on_idle
        self._on_stall = on_stall
        self._headers = headers
        self._ping_s = PING_S if ping_s is None else ping_s
        self._stall_s = STALL_S if stall_s is None else stall_s
        self._loop = asyncio.get_running_loop()
        self._writing = False
        self._changed_at = self._loop.time()
        """When the current write began, or the last one ended."""
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> EventStream:
        self._arm()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        # One timer a stream that looks now and then, instead of one a write.
        self._timer = self._loop.call_later(min(self._ping_s, self._stall_s) / 3, self._look)

    def _look(self) -> None:
        unchanged_s = self._loop.time() - self._changed_at
        if self._writing and unchanged_s >= self._stall_s:
            self._on_stall(ClientStalled(f"the client has not read for {self._stall_s:.0f} s"))
            self._exchange.abort()
            return
        if not self._writing and unchanged_s >= self._ping_s:
            self._on_idle()
        self._arm()

    async def write(self, events: bytes) -> None:
        """Send events (or a ping) in one piece; waits while the client's buffers are full."""
        await self._send(events, more=True)

    @property
    def takes_more(self) -> bool:
        """:meth:`write_now` may be called: the answer has begun, and its client reads."""
        return not self._writing and self._exchange.takes_more

    def write_now(self, events: bytes) -> None:
        """As :meth:`write`, for who cannot wait: only if :attr:`takes_more`."""
        self._exchange.write_now(events)
        self._changed_at = self._loop.time()

    async def ping(self, events: bytes = PING) -> None:
        await self._send(events, more=True)

    async def close(self, events: bytes = b"") -> None:
        """Send the last events and end the answer."""
        await self._send(events, more=False)

    async def _send(self, events: bytes, *, more: bool) -> None:
        self._writing = True
        self._changed_at = self._loop.time()
        try:
            if not self._exchange.started:
                await self._exchange.start(200, {**_HEADERS, **self._headers()}, _CONTENT_TYPE)
            await self._exchange.write(events, more=more)
        finally:
            self._writing = False
            self._changed_at = self._loop.time()
