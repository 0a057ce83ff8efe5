"""Two meshes that stay up and take turns, so that what else the machine does falls on both alike.

Owns the processes of both, and what is measured of each.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from microserve.services.local.directory import MeshDirectory

ALONE = 40
"""Short requests, one by one, in a round."""


@dataclass
class Side:
    url: str
    pids: list[int]
    """Of its services."""
    directory: Path
    rates: list[float] = field(default_factory=list)
    """Output tokens a second, of a round."""
    alone_ms: list[float] = field(default_factory=list)
    """Of each request that was alone."""
    cpu_ms: list[float] = field(default_factory=list)
    """CPU time of all services for an output token, of a round: what a busy machine leaves comparable."""

    def cpu_s(self) -> float:
        return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in self.pids)

    def forget(self) -> None:
        """What was done once."""
        self.rates.clear()
        self.alone_ms.clear()
        self.cpu_ms.clear()


@contextmanager
def mesh(
    model: str, *assignments: str, checkout: str = "", environment: Mapping[str, str] | None = None
) -> Iterator[Side]:
    """Two engines. ``checkout``: of another one's code; ``environment``: more of it."""
    said = {**os.environ, **(environment or {})}
    if checkout:
        said["PYTHONPATH"] = str(Path(checkout).resolve() / ".src")
    with tempfile.TemporaryDirectory(prefix="sides-") as home:
        given = [f"model.path={model}", "model.name=m", "index.address=tcp://127.0.0.1:0", "gateway.port=0"]
        given += ["router.address=tcp://127.0.0.1:0", "mesh.engines=2", *assignments]
        command = [sys.executable, "-P", "-m", "microserve.services"]
        flags = [word for each in given for word in ("--set", each)]
        up = [*command, "up", "--detach", "--no-demo", *flags]
        subprocess.run(up, cwd=home, env=said, check=True, stdout=subprocess.DEVNULL)
        try:
            directory = MeshDirectory(Path(home) / ".microserve")
            state = directory.read()
            assert state is not None
            yield Side(state.url, [child.pid for child in state.children], directory.root)
        finally:
            subprocess.run([*command, "down"], cwd=home, check=True, stdout=subprocess.DEVNULL)


async def ask(
    client: httpx.AsyncClient,
    side: Side,
    prompt: list[int],
    tokens: int,
    strategy: str,
    traceparent: str = "",
) -> int:
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
    headers = {"x-microserve-strategy": strategy} | ({"traceparent": traceparent} if traceparent else {})
    lines = 0
    async with client.stream(
        "POST", f"{side.url}/v1/completions", json=body | {"stream": True}, headers=headers
    ) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            lines += line.startswith("data: {")
    return tokens if lines else 0


async def ask_alone(client: httpx.AsyncClient, side: Side, number: int, traceparent: str = "") -> None:
    """One short request, timed."""
    began = time.perf_counter()
    await ask(client, side, [9 + number % 50] * 24, 1, "data_parallel", traceparent)
    side.alone_ms.append((time.perf_counter() - began) * 1000)


async def play(side: Side, number: int, streams: int, tokens: int) -> None:
    """Streams at once, half of them by two engines."""
    async with httpx.AsyncClient(timeout=600.0) as client:
        prompts = [[11 + (number * streams + each) % 80] * 200 for each in range(streams)]
        strategies = ("data_parallel", "disaggregated")
        began, cpu_s = time.perf_counter(), side.cpu_s()
        counts = await asyncio.gather(
            *(ask(client, side, prompt, tokens, strategies[each % 2]) for each, prompt in enumerate(prompts))
        )
        side.rates.append(sum(counts) / (time.perf_counter() - began))
        side.cpu_ms.append((side.cpu_s() - cpu_s) / sum(counts) * 1000)
