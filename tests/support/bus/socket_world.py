"""Real sockets inside a loop, for tests of the transport."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import uvloop

from microserve.protocol.bus.transport import ServerSocket, ZmqBus

ANY = "tcp://127.0.0.1:0"
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def on_bus(
    test: Callable[[ZmqBus], Awaitable[None]],
    *,
    loop: str = "asyncio",
    high_water_mark: int = 10_000,
    linger_s: float = 0.2,
) -> None:
    async def run() -> None:
        bus = ZmqBus(high_water_mark=high_water_mark, linger_s=linger_s)
        try:
            await test(bus)
        except BaseException:
            bus.context.destroy(0)  # sockets of the test's own would keep the bus waiting
            raise
        else:
            bus.close()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(run())


def echo_server(bus: ZmqBus) -> ServerSocket:
    def answer(peer: bytes, frames: list[bytes]) -> None:
        server.send(peer, frames)

    server = bus.server(ANY, answer)
    return server


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)
