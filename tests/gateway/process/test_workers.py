"""``gateway.workers``: processes on one port. One that dies costs its own streams and nobody else's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from microserve.protocol import log
from microserve.protocol.bus.transport import ZmqBus
from tests.support.gateway.gateway_world import BEAT_S, ScriptedRouter, Served, run

pytestmark = pytest.mark.slow

NUM_STREAMS = 24
"""Dealt out by the kernel to two workers: that one gets none has a chance of one in eight million."""


@dataclass
class Gateway:
    process: asyncio.subprocess.Process
    events: list[dict[str, Any]] = field(default_factory=list)
    _grown: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.events.append(json.loads(line))
            self._grown.set()

    async def event(self, wanted: Callable[[dict[str, Any]], bool], count: int = 1) -> list[dict[str, Any]]:
        """All such events, once there are ``count`` of them."""
        while len(found := [each for each in self.events if wanted(each)]) < count:
            self._grown.clear()
            await self._grown.wait()
        return found

    async def started(self, child: str, life: int = 1) -> int:
        """Its process in that life."""
        events = await self.event(
            lambda each: each["event"] == log.CHILD_STARTED and each["child"] == child, life
        )
        return int(events[life - 1]["child_pid"])

    async def joined(self, worker: str, life: int = 1) -> None:
        """Until that life of it may send requests to the router."""
        await self.event(lambda each: each["event"] == log.ROUTER_JOINED and each["id"] == worker, life)

    async def address(self) -> str:
        """Once all of it serves."""
        for number in range(2):
            await self.joined(f"g-{number}")
        events = await self.event(lambda each: each["event"] == log.SERVICE_READY and each["id"] == "g")
        return str(events[0]["address"])


@asynccontextmanager
async def gateway(model: Path, router: ScriptedRouter, *settings: str) -> AsyncIterator[Gateway]:
    command = [sys.executable, "-P", "-m", "microserve.services", "gateway", "--workers", "2"]
    for each in (
        "bus.insecure=true",
        f"model.path={model}",
        "model.name=tiny",
        "gateway.port=0",
        "gateway.id=g",
        f'gateway.routers=["{router.address}"]',
        f"bus.heartbeat_interval_s={BEAT_S}",
        "bus.liveness=200",
        *settings,
    ):
        command += ["--set", each]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    made = Gateway(process)
    reading = asyncio.create_task(made.read())
    try:
        yield made
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await reading


@dataclass
class Client:
    """One streamed request on a connection of its own."""

    name: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def ask(cls, address: str, name: str) -> Client:
        host, _, port = address.rpartition("/")[2].rpartition(":")
        made = cls(name, *await asyncio.open_connection(host, int(port)))
        body = json.dumps({"model": "tiny", "prompt": "Hello", "max_tokens": 8, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: t\r\nx-request-id: {name}\r\n"
        made.writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        return made

    async def rest(self) -> bytes:
        """Up to the end of the answer, or of the connection."""
        content = b""
        with contextlib.suppress(ConnectionError):
            while not content.endswith(b"\r\n0\r\n\r\n") and (part := await self.reader.read(65536)):
                content += part
        await self.close()
        return content

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


async def ask_many(address: str, router: ScriptedRouter, count: int) -> list[tuple[Client, Served]]:
    """Streams that have begun, each with its request at the router."""
    asked = []
    for number in range(count):
        client = await Client.ask(address, f"c{number}")
        served = await router.request()
        served.send([40, 41])
        asked.append((client, served))
    return asked


async def get(address: str, path: str) -> str:
    host, _, port = address.rpartition("/")[2].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET {path} HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n".encode())
    content = await reader.read()
    writer.close()
    await writer.wait_closed()
    return content.decode()


def test_a_worker_that_is_killed_takes_its_own_streams_and_no_others(model: Path) -> None:
    async def main() -> None:
        bus = ZmqBus(linger_s=0.0)
        router = ScriptedRouter(bus)
        async with gateway(model, router) as made:
            address = await made.address()
            asked = await ask_many(address, router, NUM_STREAMS)
            by_worker: dict[bytes, list[tuple[Client, Served]]] = {}
            for each in asked:
                by_worker.setdefault(each[1].peer, []).append(each)
            assert len(by_worker) == 2

            os.kill(await made.started("g-0"), signal.SIGKILL)
            await made.event(lambda each: each["event"] == log.CHILD_EXITED)
            cut = await asyncio.wait_for(_first_cut(by_worker), 20)
            (whole,) = set(by_worker) - {cut}
            for client, _ in by_worker[cut]:
                assert b"[DONE]" not in await client.rest()

            # The port is there, and the other one serves whoever comes.
            after = await ask_many(address, router, 4)
            for client, served in [*by_worker[whole], *after]:
                served.send([42, 43])
                served.end()
                answer = await client.rest()
                assert answer.endswith(b"\r\n0\r\n\r\n") and b"[DONE]" in answer, client.name
                assert answer.count(b'"text":') >= 2

            # And it comes back.
            again = await made.started("g-0", 2)
            assert again != await made.started("g-0")
            await made.joined("g-0", 2)
            scraped = await get(address, "/metrics")
            for number in range(2):
                assert f'microserve_routers_alive{{worker="{number}"}} 1.0' in scraped
            assert scraped.count("# TYPE microserve_request_success_total ") == 1

            made.process.send_signal(signal.SIGTERM)
            assert await made.process.wait() == 0
            for pid in (again, await made.started("g-1")):
                with pytest.raises(ProcessLookupError):
                    os.kill(pid, 0)
        await router.close()
        bus.close()

    run(main(), timeout_s=60)


async def _first_cut(by_worker: dict[bytes, list[tuple[Client, Served]]]) -> bytes:
    """Whose connections have ended: each has its head and first event in its buffer, so an end is a cut."""

    async def ended(peer: bytes) -> bytes:
        await by_worker[peer][0][0].rest()
        return peer

    tasks = [asyncio.create_task(ended(peer)) for peer in by_worker]
    done, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    (only,) = done
    peer = only.result()
    for clients in by_worker.values():  # what was read of the first one is gone
        await clients.pop(0)[0].close()
    return peer


def test_a_stop_lets_the_streams_of_all_workers_finish(model: Path) -> None:
    async def main() -> None:
        bus = ZmqBus(linger_s=0.0)
        router = ScriptedRouter(bus)
        async with gateway(model, router) as made:
            asked = await ask_many(await made.address(), router, NUM_STREAMS)
            assert len({served.peer for _, served in asked}) == 2
            made.process.send_signal(signal.SIGTERM)
            for client, served in asked:
                served.send([42])
                served.end()
                assert b"[DONE]" in await client.rest()
            assert await made.process.wait() == 0
        await router.close()
        bus.close()

    run(main(), timeout_s=60)


def test_a_wrong_setting_of_a_worker_is_the_gateways(tmp_path: Path) -> None:
    async def main() -> None:
        bus = ZmqBus(linger_s=0.0)
        router = ScriptedRouter(bus)
        (tmp_path / "config.json").write_text("{}")
        async with gateway(tmp_path, router) as made:  # by its parent it is a model's directory
            assert await made.process.wait() == 2
            errors = [each["error"] for each in made.events if each["event"] == log.SERVICE_FAILED]
            assert any("no tokenizer.json" in error for error in errors)
        await router.close()
        bus.close()

    run(main(), timeout_s=60)


def test_two_gateways_do_not_share_a_port_by_accident(model: Path) -> None:
    async def main() -> None:
        bus = ZmqBus(linger_s=0.0)
        router = ScriptedRouter(bus)
        async with gateway(model, router) as first:
            port = (await first.address()).rpartition(":")[2]
            async with gateway(model, router, f"gateway.port={port}") as second:
                assert await second.process.wait() == 2
                failed = [each for each in second.events if each["event"] == log.SERVICE_FAILED]
                assert "cannot listen" in failed[-1]["error"]
        await router.close()
        bus.close()

    run(main(), timeout_s=60)
