"""The port at which a service's metrics are read: HTTP in threads of its own, by the standard library.

    scraper ── GET ──> a thread ── asks the loop ──> the service copies its numbers (Readings)
                       makes the text        <──────

The loop is only ever asked to copy numbers, at most once a second. A reader that is slow, silent or gone
holds a thread of ``MAX_CONNECTIONS``, for ``SILENCE_S`` of standing still, and nothing else. A port that is
taken is told in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from typing import Any, Self, cast
from urllib.parse import parse_qs, urlsplit

import structlog

from microserve.protocol import log
from microserve.protocol.metrics.lag import LoopLag
from microserve.protocol.metrics.readings import Readings
from microserve.protocol.metrics.table.common import CPU, LOOP_LAG

MAX_CONNECTIONS = 8
"""At a time; one more is closed, if none of them has ended ``PLACE_S`` later."""
PLACE_S = 1.0
"""A reader whose last connection is just ending finds a place for its next one."""
SILENCE_S = 5.0
"""A connection on which nothing comes, or nothing is taken, for so long is closed."""
ANSWER_S = 2.0
"""The service's loop has so long to copy its numbers."""
KEPT_S = 1.0
"""A text is given to all who ask within so long of its making."""

_logger = structlog.get_logger()


class Unanswered(Exception):
    """The loop did not come to it."""


class MetricsPort:
    """Make it inside the loop of the service, and use it as a context: it is open as long as that."""

    def __init__(self, host: str, port: int, collect: Callable[[], Readings]) -> None:
        """``collect`` is called in the loop, and must be quick. ``port`` 0: none is opened."""
        self._host, self._port = host, port
        self._collect = collect
        self._loop = asyncio.get_running_loop()
        self._lag = LoopLag()
        self._watching: asyncio.Task[None] | None = None
        self._server: _Server | None = None
        self._making = threading.Lock()
        self._texts: dict[bool, tuple[float, bytes]] = {}
        self._cpu_s = {"copy": 0.0, "text": 0.0}

    @property
    def address(self) -> str:
        """``HOST:PORT``; empty: it is not open."""
        if self._server is None:
            return ""
        host, port = self._server.server_address[:2]
        return f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"

    def open(self) -> None:
        """The service goes on without, where that cannot be."""
        if not self._port:
            return
        try:
            self._server = _Server(self._host, self._port, self)
        except OSError as error:
            _logger.warning(log.METRICS_UNSERVED, address=f"{self._host}:{self._port}", error=str(error))
            return
        self._watching = self._loop.create_task(self._lag.watch(), name="loop lag")
        threading.Thread(target=self._server.run, name="metrics", daemon=True).start()
        _logger.info(log.METRICS_SERVED, address=self.address)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        if self._server is not None:
            self._server.end()

    # --- in threads of the port ----------------------------------------------------------------------

    def text(self, *, vllm_names: bool) -> bytes:
        """At most a second old. Raises :class:`Unanswered`."""
        from microserve.protocol.metrics import text  # 6 MB and 0.1 s: not before somebody asks

        with self._making:
            made, kept = self._texts.get(vllm_names, (float("-inf"), b""))
            if time.monotonic() - made < KEPT_S:
                return kept
            began = time.thread_time()
            readings = self._in_loop(self._read)
            names = text.names_of(family for family, _ in readings) if vllm_names else {}
            kept = text.text_of(chain(text.metrics_of(readings), text.of_process()), names)
            self._texts[vllm_names] = (time.monotonic(), kept)
            self._cpu_s["text"] += time.thread_time() - began
            return kept

    def check(self) -> None:
        """Raises :class:`Unanswered`."""
        self._in_loop(Readings)

    def _read(self) -> Readings:
        began = time.thread_time()
        readings = self._collect()
        readings.add(LOOP_LAG, self._lag.late)
        self._cpu_s["copy"] += time.thread_time() - began
        readings.add_each(CPU, self._cpu_s)
        return readings

    def _in_loop(self, call: Callable[[], Readings]) -> Readings:
        asked: Future[Readings] = Future()

        def answer() -> None:
            if asked.set_running_or_notify_cancel():
                try:
                    asked.set_result(call())
                except Exception as error:
                    asked.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(answer)
            return asked.result(ANSWER_S)
        except TimeoutError:
            asked.cancel()
            raise Unanswered(f"the service's loop has not answered for {ANSWER_S:g} s") from None
        except RuntimeError:  # it is closed
            raise Unanswered("the service has ended") from None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, host: str, port: int, metrics: MetricsPort) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.metrics = metrics
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._ended = False
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """Without the name of this host, which a resolver may take seconds for."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def run(self) -> None:
        """Sleeps until somebody comes: no poll wakes an idle service."""
        while not self._ended:
            self.handle_request()
        self.server_close()

    def end(self) -> None:
        """From any thread."""
        self._ended = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes ``run``

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(timeout=PLACE_S):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread is to be had
            self._free.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who reads metrics may go away at any moment."""


class _Handler(BaseHTTPRequestHandler):
    timeout = SILENCE_S
    server_version = "microserve"
    sys_version = ""

    def do_GET(self) -> None:
        metrics = cast(_Server, self.server).metrics
        url = urlsplit(self.path)
        try:
            if url.path == "/metrics":
                names = parse_qs(url.query).get("names", [])
                self._reply(200, metrics.text(vllm_names="vllm" in names))
            elif url.path == "/health":
                metrics.check()
                self._reply(200, b"{}", "application/json")
            else:
                self._reply(404, b"GET /metrics, /metrics?names=vllm or /health\n")
        except Unanswered as error:
            self._reply(503, f"{error}\n".encode())

    def _reply(
        self, status: int, body: bytes, kind: str = "text/plain; version=0.0.4; charset=utf-8"
    ) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass
