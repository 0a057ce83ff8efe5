"""A client that does nothing but measure: plain sockets in one thread of a process of its own.

    python stopwatch.py HOST PORT WIDTH PIDS < orders > lines

Owns how long each answer took from before its connection to its last byte, how much of that was this
process's own waiting for a processor, and the signal that an engine gets in the midst of an answer. Orders
and results are lines of JSON (:class:`Order`, :class:`Took`), PIDS a JSON object of engines; WIDTH orders are
under way at a time. Knows nothing of the project, so that it starts at once.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypedDict

END_OF_CHUNKS: Final = b"\r\n0\r\n\r\n"
MIDST: Final = 30
SEND_BUFFER_NBYTES: Final = 4 << 20
"""A body goes in one call."""


class Order(TypedDict):
    id: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    signal: int
    """Send it to the engine that generates after :data:`MIDST` events; 0: none."""
    leaves: bool
    """Close the connection after :data:`MIDST` events."""


class Took(TypedDict):
    id: str
    status: int
    wall_s: float
    lag_s: float
    """Of ``wall_s``, what this process waited for a processor at its start and its end, or was busy with
    another answer meanwhile."""


class RunQueue:
    """How long this thread has waited for a processor."""

    def __init__(self) -> None:
        self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)

    def waited_s(self) -> float:
        return int(os.pread(self._file, 128, 0).split()[1]) / 1e9


class Request:
    def __init__(self, order: Order, address: tuple[str, int], run_queue: RunQueue) -> None:
        self.order = order
        payload = json.dumps(order["body"]).encode()
        lines = [f"POST {order['path']} HTTP/1.1", "host: localhost", "content-type: application/json"]
        lines += [f"content-length: {len(payload)}", f"x-request-id: {order['id']}"]
        lines += [f"{name}: {value}" for name, value in order["headers"].items()]
        message = "\r\n".join(lines).encode() + b"\r\n\r\n" + payload
        waited_s = run_queue.waited_s()
        self.began = time.monotonic()
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_NBYTES)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.connect(address)
        self.socket.sendall(message)
        self.start_lag_s = run_queue.waited_s() - waited_s
        self._head = b""
        self._tail = b""
        self._num_left = -1
        self._num_events = 0
        self._is_signalled = False

    def take(self, pids: dict[str, int]) -> bool:
        """What has come; whether the request is over."""
        data = self.socket.recv(1 << 20)
        if not data:
            return True
        if not self._tail:
            self._head += data
            head, end, data = self._head.partition(b"\r\n\r\n")
            if not end:
                return False
            length = self._header("content-length")
            self._num_left = int(length) if length else -1
            self._tail = end
            self._head = head
        self._num_events += data.count(b"data:")
        self._tail = (self._tail + data)[-len(END_OF_CHUNKS) :]
        if self._num_left >= 0:
            self._num_left -= len(data)
        over = self._num_left == 0 or (self._num_left < 0 and self._tail == END_OF_CHUNKS)
        is_midst = self._num_events >= MIDST
        if is_midst and self.order["signal"] and not self._is_signalled:
            self._is_signalled = True
            os.kill(pids[self._header("x-microserve-engines").split(",")[-1]], self.order["signal"])
        return over or (is_midst and self.order["leaves"])

    def _header(self, name: str) -> str:
        for line in self._head.decode("latin-1").split("\r\n"):
            if line.lower().startswith(f"{name}:"):
                return line.partition(":")[2].strip()
        return ""

    def took(self, now: float, lag_s: float) -> Took:
        return Took(
            id=self.order["id"],
            status=int(self._head.split()[1]) if self._head else 0,
            wall_s=now - self.began,
            lag_s=lag_s,
        )


def run(
    orders: Iterator[Order],
    address: tuple[str, int],
    width: int,
    pids: dict[str, int],
    tell: Callable[[Took], None],
) -> None:
    """All of them, ``width`` at a time."""
    run_queue = RunQueue()
    selector = selectors.DefaultSelector()
    slept_at = time.monotonic()
    while True:
        while len(selector.get_map()) < width and (order := next(orders, None)) is not None:
            request = Request(order, address, run_queue)
            selector.register(request.socket, selectors.EVENT_READ, request)
        if not selector.get_map():
            return
        waited_s = run_queue.waited_s()
        busy_s = time.monotonic() - slept_at  # an answer's end that comes meanwhile is seen so much later
        ready = selector.select()
        now = slept_at = time.monotonic()
        lag_s = busy_s + run_queue.waited_s() - waited_s
        for key, _ in ready:
            request = key.data
            if request.take(pids):
                selector.unregister(request.socket)
                request.socket.close()
                tell(request.took(now, request.start_lag_s + lag_s))


def _say(took: Took) -> None:
    print(json.dumps(took), flush=True)


if __name__ == "__main__":
    host, port, width, pids = sys.argv[1:]
    run((json.loads(line) for line in sys.stdin), (host, int(port)), int(width), json.loads(pids), _say)
