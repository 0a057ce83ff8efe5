"""SIGKILL of the gateway with streams in flight: its requests end on every engine, and a new one serves."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from microserve.protocol.bus.transport import ZmqBus
from tests.support.engine.engine_client import EngineClient
from tests.support.process.processes import MeshProcesses

pytestmark = [pytest.mark.system, pytest.mark.timeout(200)]

IN_FLIGHT = 16
STRATEGIES = ["data_parallel", "disaggregated", "balanced", "cache_aware", "migrate", "auto"]


def test_the_engines_are_free_again(tiny_model: Path, tmp_path: Path) -> None:
    with MeshProcesses(tiny_model, tmp_path, gateway=True) as mesh:
        asyncio.run(_kill(mesh))


async def _kill(mesh: MeshProcesses) -> None:
    base = f"http://127.0.0.1:{mesh.gateway_port}"
    started: asyncio.Queue[int] = asyncio.Queue()

    async def stream(http: httpx.AsyncClient, number: int) -> None:
        body = {"model": mesh.model.name, "prompt": [20 + number] * 100, "max_tokens": 300, "stream": True}
        headers = {"x-microserve-strategy": STRATEGIES[number % len(STRATEGIES)]}
        body |= {"ignore_eos": True}
        async with http.stream("POST", "/v1/completions", json=body, headers=headers) as reply:
            async for _ in reply.aiter_bytes():
                started.put_nowait(number)

    async with httpx.AsyncClient(base_url=base, timeout=60.0) as http:
        await _ready(http)
        streams = [asyncio.ensure_future(stream(http, number)) for number in range(IN_FLIGHT)]
        async with asyncio.timeout(60):
            await started.get()
        mesh.services["gateway"].kill()
        async with asyncio.timeout(30):
            ends = await asyncio.gather(*streams, return_exceptions=True)
        assert any(isinstance(end, httpx.HTTPError) for end in ends)
    await _engines_are_free(mesh)
    mesh.services.pop("gateway")
    await asyncio.to_thread(mesh.start, "gateway")
    async with httpx.AsyncClient(base_url=base, timeout=60.0) as http:
        await _ready(http)
        reply = await http.post("/v1/completions", json={"model": mesh.model.name, "prompt": "hello"})
        assert reply.status_code == 200


async def _ready(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(60):
        while (await http.get("/ready")).status_code != 200:
            await asyncio.sleep(0.05)


async def _engines_are_free(mesh: MeshProcesses) -> None:
    bus = ZmqBus(linger_s=0.1)
    try:
        for name in ("engine-0", "engine-1"):
            async with EngineClient(bus, mesh.services[name].address) as engine, asyncio.timeout(60):
                assert engine.info is not None
                while True:
                    load = (await engine.stats()).load
                    busy = load.num_running + load.num_waiting + load.num_grants + load.quarantined_blocks
                    if not busy and load.free_blocks == engine.info.num_blocks:
                        break
                    await asyncio.sleep(0.05)
    finally:
        bus.close()
