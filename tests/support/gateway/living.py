"""A gateway and its router on a loop of their own, for clients that wait for their answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

from tests.support.gateway.gateway_world import GatewayWorld, Served, gateway_world


class Living:
    """``answer`` says what the router answers; it may be changed between two requests."""

    def __init__(
        self, directory: Path, *settings: str, answer: Callable[[Served], None], **router: Any
    ) -> None:
        """``settings`` and ``router``: as of :func:`gateway_world`."""
        self.address = ""
        self.answer = answer
        self.world: GatewayWorld | None = None
        self._directory, self._settings = directory, settings
        self._router = router
        self._ready = threading.Event()
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="gateway")
        self._thread.start()
        assert self._ready.wait(60.0)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            async with gateway_world(self._directory, *self._settings, **self._router) as world:
                world.router.answer = self._answer
                self.world, self.address = world, world.address
                self._ready.set()
                await self._stop.wait()
        finally:
            self._ready.set()

    def _answer(self, served: Served) -> None:
        self.answer(served)

    def served(self) -> list[Served]:
        """Every choice that has come to the router so far."""
        assert self.world is not None
        return list(self.world.router.served.values())

    def close(self) -> None:
        assert self._loop is not None and self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60.0)
        assert not self._thread.is_alive()
