"""A mesh of the release before is renewed service by service under load, and taken back: no request is lost.

In the order of docs/operations.md: index, routers, engines, gateways; back in the reverse order.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from microserve.protocol import log
from tests.support.process.processes import free_port
from tests.support.upgrade.release import MixedMesh, unpacked

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

STRATEGIES = ["data_parallel", "disaggregated", "balanced", "cache_aware", "migrate", "auto"]
ENGINES = ["engine-0", "engine-1"]
ORDER = ["index", "router", "router-1", *ENGINES, "gateway", "gateway-1"]
CONCURRENCY = 4
MAX_TOKENS = 120


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(tmp_path_factory.mktemp("release"))


@dataclass
class Load:
    """Streams, so many at once, over and over, at the gateways that are in rotation."""

    model: str
    rotation: list[int]
    """Ports, as a load balancer knows them."""
    expected: list[str] = field(default_factory=list)
    num_answers: int = 0
    under_way: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = random.Random(7)
        lengths = [rng.randrange(20, 200) for _ in range(12)]
        self.prompts = [[rng.randrange(20, 250) for _ in range(length)] for length in lengths]
        self._salts = itertools.count()

    async def ask(self, http: httpx.AsyncClient, number: int) -> str:
        port = self.rotation[next(self._salts) % len(self.rotation)]
        body = {
            **{"model": self.model, "prompt": self.prompts[number], "max_tokens": MAX_TOKENS, "stream": True},
            **{"temperature": 0.0, "ignore_eos": True, "cache_salt": str(next(self._salts))},
        }
        strategy = {"x-microserve-strategy": STRATEGIES[number % len(STRATEGIES)]}
        url = f"http://127.0.0.1:{port}/v1/completions"
        self.under_way[port] = self.under_way.get(port, 0) + 1
        text, reason = "", None
        async with http.stream("POST", url, json=body, headers=strategy) as answer:
            assert answer.status_code == 200, (await answer.aread(), answer.status_code, number)
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
                    assert "error" not in chunk, chunk
                    text += chunk["choices"][0]["text"]
                    reason = chunk["choices"][0]["finish_reason"] or reason
        self.under_way[port] -= 1
        assert reason == "length", (reason, text)
        return text

    async def run(self, http: httpx.AsyncClient, stop: asyncio.Event) -> None:
        numbers = itertools.cycle(range(len(self.prompts)))

        async def work() -> None:
            while not stop.is_set():
                number = next(numbers)
                assert await self.ask(http, number) == self.expected[number], self.prompts[number]
                self.num_answers += 1

        async with asyncio.TaskGroup() as tasks:
            for _ in range(CONCURRENCY):
                tasks.create_task(work())


def make_mesh(model: Path, directory: Path, release: Path, old: set[str]) -> MixedMesh:
    settings = [
        *("model.dtype=float32", "engine.cpu_kernels=transformers", "gateway.drain_s=60"),
        f"index.control_path={directory / 'control.db'}",
    ]
    return MixedMesh(
        model,
        directory,
        num_engines=len(ENGINES),
        num_routers=2,
        gateway=True,
        settings=settings,
        release=release,
        old=old,
        gateway_ports={"gateway-1": free_port()},
    )


async def until(what: str, holds: Any, loading: asyncio.Task[None] | None = None) -> None:
    async with asyncio.timeout(90):
        while not holds():
            if loading is not None and loading.done():
                await loading
            await asyncio.sleep(0.05)


def knows_engines(mesh: MixedMesh, router: str) -> bool:
    """Has this life of a router joined every engine in its present life?"""
    here: set[str] = set()
    for event in mesh.events(router):
        engine = str(event.get("engine_id"))
        if event["event"] == log.ENGINE_JOINED:
            here.add(engine)
        elif event["event"] in (log.ENGINE_LOST, log.ENGINE_LEFT):
            here.discard(engine)
    return here == set(ENGINES)


async def renew(mesh: MixedMesh, name: str, load: Load, loading: asyncio.Task[None]) -> None:
    """One service, as an operator does it: out of rotation, SIGTERM, the other version, into rotation."""
    port = mesh.gateway_ports.get(name, 0)
    if port:
        load.rotation.remove(port)
    process = mesh.services[name].process
    process.send_signal(signal.SIGTERM)
    await until(f"{name} is gone", lambda: process.poll() is not None, loading)
    assert process.returncode == 0, mesh.services[name].log.read_text()[-3000:]
    mesh.start(name, wait=False)
    await asyncio.to_thread(mesh.wait_ready, name)
    for router in ("router", "router-1"):
        await until(f"{router} knows all", lambda: knows_engines(mesh, router), loading)  # noqa: B023
    if port:
        async with httpx.AsyncClient() as http, asyncio.timeout(60):
            while (await http.get(f"http://127.0.0.1:{port}/ready")).status_code != 200:
                await asyncio.sleep(0.05)
        load.rotation.append(port)
    before = load.num_answers
    await until(f"served on with {name}", lambda: load.num_answers >= before + CONCURRENCY, loading)


async def roll(mesh: MixedMesh, order: list[str], load: Load, *, to_old: bool) -> None:
    async with httpx.AsyncClient(timeout=90) as http:
        if not load.expected:
            load.expected = await asyncio.gather(*(load.ask(http, n) for n in range(len(load.prompts))))
        stop = asyncio.Event()
        loading = asyncio.create_task(load.run(http, stop))
        try:
            for name in order:
                (mesh.old.add if to_old else mesh.old.discard)(name)
                await renew(mesh, name, load, loading)
        finally:
            stop.set()
        async with asyncio.timeout(90):
            await loading


def label(mesh: MixedMesh, *words: str) -> str:
    """What ``microserve label`` says, of this release's."""
    command = [sys.executable, "-P", "-m", "microserve.services", "label", *words]
    command += ["--index", mesh.index_address]
    environment = {**os.environ, "MICROSERVE_BUS__INSECURE": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_up_and_back_under_load(tiny_model: Path, tmp_path: Path, release: Path) -> None:
    with make_mesh(tiny_model, tmp_path, release, set(ORDER)) as mesh:
        mesh.start("gateway-1")
        load = Load(tiny_model.name, [mesh.gateway_ports[name] for name in ("gateway", "gateway-1")])

        label(mesh, "engine-0", "prefill", "decode", "of-before")
        asyncio.run(roll(mesh, ORDER, load, to_old=False))
        assert not mesh.old
        assert "of-before" in label(mesh, "--list")
        label(mesh, "engine-0", "prefill", "decode", "of-today")
        num_up = load.num_answers
        asyncio.run(roll(mesh, ORDER[::-1], load, to_old=True))
        assert "of-today" in label(mesh, "--list")

        print(f"{num_up} answers on the way up, {load.num_answers - num_up} on the way back, all right")
