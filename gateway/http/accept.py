"""Connections let in as long as there is room for them: bounded below the limit of descriptors.

Owns the listening socket's place in the loop. Full, or without a descriptor, it pauses: who comes waits in
the kernel's queue. Connections that have said nothing for a while make room for those who wait. Knows no
HTTP.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import Any

import structlog

from microserve.protocol import log
from microserve.protocol.process.limits import descriptor_limit, num_descriptors

ACCEPTS_PER_TURN = 64
PAUSE_S = 0.05
"""Between two looks for room."""
SPARE_DESCRIPTORS = 64
"""For routers that come back, logs that are opened anew, and what libraries need."""
MIN_CONNECTIONS = 16

_logger = structlog.get_logger()


def room_for_connections(wanted: int = 0) -> int:
    """Connections that may be open at a time: ``wanted`` (0: any number), or fewer if descriptors are
    scarce."""
    room = max(MIN_CONNECTIONS, descriptor_limit() - num_descriptors() - SPARE_DESCRIPTORS)
    return min(wanted, room) if wanted else room


class Acceptor:
    """In uvicorn's place of an ``asyncio.Server``: accepts from now until :meth:`close`."""

    def __init__(
        self,
        listener: socket.socket,
        connect: Callable[[socket.socket, float | None], Coroutine[Any, Any, object]],
        *,
        max_connections: int,
        num_open: Callable[[], int],
        make_room: Callable[[], None],
    ) -> None:
        """``connect`` makes a connection of an accepted socket, and is told ``time.monotonic`` when something
        to read was there already; ``num_open`` counts those that there are;
        ``make_room`` closes some that can be spared, or none."""
        self._listener = listener
        self._connect = connect
        self._max = max_connections
        self._num_open = num_open
        self._make_room = make_room
        self._loop = asyncio.get_running_loop()
        self._connecting: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._resume()

    def _resume(self) -> None:
        self._timer = None
        if not self._closed:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _pause(self, reason: str) -> None:
        """The listener stays readable as long as somebody waits: to watch it would be a busy loop."""
        _logger.warning(log.HTTP_PAUSED, code=reason, connections=self._num_open())
        self._loop.remove_reader(self._listener.fileno())
        self._make_room()
        self._timer = self._loop.call_later(PAUSE_S, self._resume)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            if self._num_open() + len(self._connecting) >= self._max:
                return self._pause("connections")
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptor, no memory
                return self._pause(error.strerror or type(error).__name__)
            connection.setblocking(False)
            task = self._loop.create_task(self._take(connection, _asked_at(connection)))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _take(self, connection: socket.socket, asked_at: float | None) -> None:
        try:
            # It takes some turns of a loop that is busy, and its client waits meanwhile.
            await self._connect(connection, asked_at or _asked_at(connection))
        except Exception:  # it went while it was let in, or does not speak TLS
            connection.close()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
            else:
                self._loop.remove_reader(self._listener.fileno())

    async def wait_closed(self) -> None:
        for task in list(self._connecting):
            task.cancel()


def _asked_at(connection: socket.socket) -> float | None:
    """Now, if the client has said something."""
    try:
        return monotonic() if connection.recv(1, socket.MSG_PEEK) else None
    except OSError:
        return None
