"""A view whose index says nothing: nobody waits for long, and nothing is complained of again and again."""

from __future__ import annotations

import asyncio
import time

import pytest
from structlog.testing import capture_logs

from microserve.gateway.view import index
from microserve.gateway.view.index import IndexLink
from microserve.gateway.view.mesh import Mesh
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import DeadlineExceeded
from microserve.protocol.messages.index import IndexReport
from tests.support.bus.direct_bus import DirectBus
from tests.support.gateway.gateway_world import run

pytestmark = pytest.mark.quick


def test_a_silent_index_is_asked_on_and_not_complained_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CALL_S", "REPEAT_S", "REPORT_S"):
        monkeypatch.setattr(index, name, 0.005)

    async def main() -> None:
        bus = ZmqBus(linger_s=0.0)
        mesh = Mesh(time.monotonic(), silence_s=5.0)
        link = IndexLink(
            bus, "tcp://127.0.0.1:1", mesh, gateway_id="g", interval_s=0.005, clock=time.monotonic
        )
        asked = 0
        report = link.report

        async def counted() -> IndexReport:
            nonlocal asked
            asked += 1
            return await report()

        monkeypatch.setattr(link, "report", counted)
        running = asyncio.create_task(link.run())
        with capture_logs() as lines:
            while asked < 4:
                await asyncio.sleep(0)
            with pytest.raises(DeadlineExceeded, match="does not answer"):
                await link.status()
        assert not [line for line in lines if line["log_level"] in ("warning", "error")]
        assert not mesh.is_index_alive(time.monotonic())
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        link.close()
        bus.close()

    run(main())


def test_a_gateway_that_ends_does_not_linger_for_an_index_that_is_away() -> None:
    bus = DirectBus()
    mesh = Mesh(time.monotonic(), silence_s=5.0)
    link = IndexLink(bus, "tcp://127.0.0.1:1", mesh, gateway_id="g", interval_s=1.0, clock=time.monotonic)
    link.close()
    [socket] = bus.clients
    assert socket.closed
    assert not socket.lingers
