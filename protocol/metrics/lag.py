"""How late a service's event loop wakes up: whatever holds it up is late by so much."""

from __future__ import annotations

import asyncio

from microserve.protocol.metrics.bounds import LAG_BOUNDS
from microserve.protocol.metrics.histogram import Histogram
from microserve.protocol.process.tick import until_tick

INTERVAL_S = 2.0
"""Between two looks: at moments at which also an idle process is awake, for its signs of life."""


class LoopLag:
    def __init__(self) -> None:
        self.late = Histogram(LAG_BOUNDS)
        """Seconds."""

    async def watch(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            left_s = until_tick(loop.time(), INTERVAL_S)
            due = loop.time() + left_s
            await asyncio.sleep(left_s)
            self.late.observe(max(0.0, loop.time() - due))
