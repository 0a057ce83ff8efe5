"""Labels set on a living mesh of real processes: by the command, under a running stream, through restarts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.bus.gateway_peer import Answer, BusClient
from tests.support.process.processes import MeshProcesses

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

PROMPT = list(range(20, 90))
LABELS = {0: ['engine.labels=["decode"]'], 1: ['engine.labels=["prefill"]']}
SHORT = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)


def label(mesh: MeshProcesses, *words: str) -> str:
    command = [sys.executable, "-P", "-m", "microserve.services", "label", *words]
    done = subprocess.run(
        [*command, "--index", mesh.index_address], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def engines_of(answer: Answer) -> list[str]:
    assert answer.ended is not None
    assert answer.reason == "length", answer.ended
    return answer.ended.engines


def test_labels_move_on_a_living_mesh_and_stay(tiny_model: Path, tmp_path: Path) -> None:
    settings = [f"index.control_path={tmp_path / 'control.db'}"]
    with MeshProcesses(
        tiny_model, tmp_path, num_routers=2, settings=settings, engine_settings=LABELS
    ) as mesh:
        asyncio.run(_move(mesh))


async def _move(mesh: MeshProcesses) -> None:
    bus = ZmqBus(linger_s=0.1)
    try:
        async with clients_of(bus, mesh) as clients:
            one = clients[0]
            reference = await one.generate(PROMPT, LONG, strategy="data_parallel")
            await check_served(clients, reference, ["engine-0", "engine-1"])

            running = one.start(PROMPT, LONG, strategy="disaggregated")
            async with asyncio.timeout(60):
                await running.grown.wait()
            said = await asyncio.to_thread(label, mesh, "engine-0", "prefill", "--reason", "test")
            assert "router  version 1" in said
            assert "router-1  version 1" in said
            await asyncio.to_thread(label, mesh, "engine-1", "decode")
            await check_served(clients, reference, ["engine-1", "engine-0"])
            async with asyncio.timeout(120):
                await running.done.wait()
            assert engines_of(running) == ["engine-0", "engine-1"]
            assert running.token_ids == reference.token_ids

        for victim in ("index", "engine-1", "router-1"):
            mesh.services[victim].kill()
            mesh.start(victim)
        listed = label(mesh, "--list").splitlines()
        assert [line.split() for line in listed[1:]] == [
            ["engine-0", "prefill", "operator", "decode"],
            ["engine-1", "decode", "operator", "prefill"],
        ]
        async with clients_of(bus, mesh) as clients:
            await check_served(clients, reference, ["engine-1", "engine-0"])
            for engine in ("engine-0", "engine-1"):
                await asyncio.to_thread(label, mesh, engine, "--reset")
            await check_served(clients, reference, ["engine-0", "engine-1"])
    finally:
        bus.close()


@asynccontextmanager
async def clients_of(bus: ZmqBus, mesh: MeshProcesses) -> AsyncIterator[list[BusClient]]:
    """One of each router, which knows both engines."""
    first, second = mesh.router_addresses.values()
    async with BusClient(bus, first) as one, BusClient(bus, second) as other:
        for client in (one, other):
            await client.wait_engines(2)
        yield [one, other]


async def check_served(clients: list[BusClient], reference: Answer, engines: list[str]) -> None:
    """The next request at every router is served by these, with the right tokens."""
    for client in clients:
        answer = await client.generate(PROMPT, SHORT, strategy="disaggregated", ttl_s=60.0)
        assert engines_of(answer) == engines
        assert answer.token_ids == reference.token_ids[: len(answer.token_ids)]
