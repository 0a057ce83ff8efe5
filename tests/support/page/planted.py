"""A server of the page and of a scene, in threads, so that a browser can be driven beside it."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import msgspec

from microserve.gateway.route import page_routes
from tests.support.page.scenes import Scene

KEY = "operator"
FEED_INTERVAL_S = 0.25


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away."""


class Planted:
    """``needs_key``: :data:`KEY` is asked for."""

    def __init__(self, scene: Scene, *, needs_key: bool = False) -> None:
        self.scene, self.needs_key = scene, needs_key
        self.came_back_with: list[str] = []
        """``Last-Event-ID`` of each time that the feed was asked for; empty: anew."""
        self.stopped = threading.Event()
        self._port = 0
        self._server: _Server | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Again on the port that it had."""
        planted = self

        class Handler(_Handler):
            world = planted

        self.stopped = threading.Event()
        self._server = _Server(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Connections break."""
        self.stopped.set()
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    world: Planted
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        world = self.world
        if path == "/" or path.startswith("/page/"):
            found = page_routes.files().get("index.html" if path == "/" else path.removeprefix("/page/"))
            if found is None:
                self._say(404, b"{}")
            else:
                self._say(200, found.body, found.kind.decode(), page_routes.HEADERS)
        elif world.needs_key and self.headers.get("authorization") != f"Bearer {KEY}":
            self._refuse(401, "a key is needed")
        elif path == "/view/feed":
            self._feed()
        elif path == "/v1/models":
            self._say(200, json.dumps({"data": [{"id": "tiny"}]}).encode())
        elif path.startswith("/view/requests/"):
            detail = world.scene.detail(path.removeprefix("/view/requests/"))
            if detail is None:
                self._refuse(404, "no such request is remembered here")
            else:
                self._say(200, msgspec.json.encode(detail))
        else:
            self._say(200, msgspec.json.encode(world.scene.answers()[path.removeprefix("/view/")]))

    def _refuse(self, status: int, message: str) -> None:
        self._say(status, json.dumps({"error": {"message": message}}).encode())

    def _say(self, status: int, body: bytes, kind: str = "application/json", more: Any = ()) -> None:
        self.send_response(status)
        for name, value in {**dict(more), "content-type": kind, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _feed(self) -> None:
        world = self.world
        last = self.headers.get("last-event-id", "")
        world.came_back_with.append(last)
        if world.scene.loses_feed and len(world.came_back_with) > 1:
            self._refuse(503, "no feed")
            return
        stopped = world.stopped
        self.close_connection = True
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        number = int(last.rpartition("-")[2] or 0)
        if not last:
            self._event(0, world.scene.snapshot())
        while not stopped.wait(FEED_INTERVAL_S) and not world.scene.loses_feed:
            number += 1
            self._event(number, world.scene.delta(number))

    def _event(self, number: int, message: msgspec.Struct) -> None:
        self.wfile.write(b"id: life-%d\ndata: %s\n\n" % (number, msgspec.json.encode(message)))
        self.wfile.flush()
