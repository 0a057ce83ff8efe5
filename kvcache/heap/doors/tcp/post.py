"""One thread that carries what the writers of one heap send to the doors of others, and brings what these
say.

    step thread                              this thread
    put, signal: into the line's queue ───>  sendmsg, from where the KV lies
    hold, read: asks and waits         <───  what the door says
                                             a sign of life for every line, and an end for those that give
                                             none

So a slow link keeps no step waiting but one that asks, and no line another one. Owns the sockets and the
lock of the lines (line.py). Does not know heaps.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import structlog

from microserve.kvcache.heap.doors.door import SILENCE_S
from microserve.kvcache.heap.doors.tcp.line import End, Line
from microserve.protocol import log
from microserve.protocol.errors import ProtocolViolation, TransferFailed

_RECEIVE_NBYTES: Final = 1 << 14
_FLIGHT_S: Final = 0.0002
"""Pause between looks at a put that goes by another way."""

_logger = structlog.get_logger()


class Post:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._lines: dict[Line, socket.socket] = {}
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_closed = False
        self._reading: Line | None = None
        """Whose parts are being sent, without the lock."""
        self._tick_s = SILENCE_S / 8
        self._thread = threading.Thread(target=self._run, name="door-post", daemon=True)
        self._thread.start()

    # --- for the threads that write ----------------------------------------------------------------

    def add(self, line: Line, connection: socket.socket) -> None:
        """``connection``: greeted. It is the post's from here. :class:`TransferFailed` if the thread has
        ended: nobody would carry what waits, nor find that the line is silent."""
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _bound(connection, line)
        with self._changed:
            if self._is_closed:
                connection.close()
                raise TransferFailed("what carries KV to doors has failed here; the log says why")
            self._lines[line] = connection
            self._tick_s = min(self._tick_s, line.silence_s / 8)
        os.eventfd_write(self._wake, 1)

    @property
    def calling(self) -> threading.Condition:
        """Held around calls of what lines use as well."""
        return self._changed

    @contextmanager
    def using(self, line: Line) -> Iterator[None]:
        """The line's state is ours; what was put into it goes out after."""
        with self._changed:
            had_some = line.has_parts or line.awaits_flight
            yield
            has_some = line.has_parts or line.awaits_flight
        if has_some and not had_some:  # else the thread is at it, or waits until the socket takes more
            os.eventfd_write(self._wake, 1)

    def wait(self, line: Line, until: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Until it is so, or the line has ended, or it takes too long; what it is then. Always ends: a line
        that nothing is heard of does."""
        with self._changed:
            self._changed.wait_for(lambda: line.end is not None or until(), timeout_s)
            return until()

    def leave_source(self, line: Line) -> None:
        """What waits is copied."""
        with self._changed:
            self._changed.wait_for(lambda: self._reading is not line)
            line.copy_waiting()

    def remove(self, line: Line) -> None:
        """When this returns, nothing is read for it any more, and its socket is closed."""
        with self._changed:
            line.lose(End.OURS)
        os.eventfd_write(self._wake, 1)
        with self._changed:
            self._changed.wait_for(lambda: line not in self._lines)

    def close(self) -> None:
        """With all lines. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    # --- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        is_flying = False
        try:
            selector.register(self._wake, selectors.EVENT_READ)
            while not self._is_closed:
                ready = selector.select(_FLIGHT_S if is_flying else self._tick_s)
                now = time.monotonic()
                for key, events in ready:
                    if key.data is None:
                        os.eventfd_read(self._wake)
                    elif events & selectors.EVENT_READ:
                        self._receive(key.data, now)
                with self._changed:
                    lines = list(self._lines.items())
                is_flying = False
                for line, connection in lines:
                    self._send(line, connection, now)
                    is_flying |= line.awaits_flight
                    with self._changed:
                        self._watch(selector, line, connection)
                        self._changed.notify_all()
        except Exception as error:
            _logger.exception(log.DOOR_FAILED, kind="tcp", error=repr(error))
        finally:
            selector.close()
            with self._changed:
                self._is_closed = True
                for line, connection in self._lines.items():
                    line.lose(End.RESET)
                    connection.close()
                self._lines.clear()
                self._changed.notify_all()

    def _receive(self, line: Line, now: float) -> None:
        connection = self._lines.get(line)
        if connection is None:
            return
        try:
            some = connection.recv(_RECEIVE_NBYTES)
        except BlockingIOError:
            return
        except OSError:
            with self._changed:
                line.lose(End.RESET)
            return
        with self._changed:
            if not some:
                line.lose(End.CLOSED)
                return
            try:
                line.received(some, now)
            except ProtocolViolation:
                line.lose(End.FAULT)

    def _send(self, line: Line, connection: socket.socket, now: float) -> None:
        with self._changed:
            line.tick(now)
        is_full = False
        while not is_full and (parts := self._parts(line)):
            sent: int | None = 0
            try:
                sent = connection.sendmsg(parts)
            except BlockingIOError:
                pass
            except OSError:
                sent = None
            with self._changed:
                self._reading = None
                self._changed.notify_all()
                if sent is None:
                    line.lose(End.RESET)
                    return
                is_full = sent < sum(map(len, parts))
                if is_full:
                    line.full(now)
                if sent and line.sent(sent, time.monotonic()):
                    _bound(connection, line)

    def _parts(self, line: Line) -> list[memoryview]:
        with self._changed:
            try:
                parts = line.parts()
                self._reading = line if parts else None
                return parts
            except TransferFailed:
                line.lose(End.RESET)
                return []

    def _watch(self, selector: selectors.BaseSelector, line: Line, connection: socket.socket) -> None:
        """Look for what it can do next, or for nothing if it has ended."""
        known = selector.get_map().get(connection)
        if line.end is not None:
            if known is not None:
                selector.unregister(connection)
            connection.close()
            del self._lines[line]
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if line.has_parts else 0)
        if known is None:
            selector.register(connection, wanted, line)
        elif known.events != wanted:
            selector.modify(connection, wanted, line)


def _bound(connection: socket.socket, line: Line) -> None:
    """What the kernel takes beyond what the network does: it stands before what is urgent."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, line.unsent_nbytes)
