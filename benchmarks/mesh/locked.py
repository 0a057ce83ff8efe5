"""What it costs that every socket is locked: two meshes, one with keys and one without, in turns.

    python benchmarks/mesh/locked.py [--model DIR] [--rounds 8] [--streams 8] [--tokens 64] [--before DIR]

Both meshes stay up and take turns, so that what else the machine does falls on both alike; which of them goes
first alternates. Prints tokens a second of concurrent streams, and the milliseconds of one short request
alone, as medians over the rounds with the ratio of locked to open. A small random model says most: next to
nothing is computed, and what is left is the mesh. ``--before``: the open one is that of another checkout,
which knows no ``bus.insecure``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from microserve.services.local.demo.model import default_cache, fetch
from microserve.services.local.directory import MeshDirectory

ALONE = 40
"""Short requests, one by one, in a round."""


@dataclass
class Side:
    url: str
    pids: list[int]
    """Of its services."""
    rates: list[float] = field(default_factory=list)
    """Output tokens a second, of a round."""
    alone_ms: list[float] = field(default_factory=list)
    """Of each request that was alone."""
    cpu_ms: list[float] = field(default_factory=list)
    """CPU time of all services for an output token, of a round: what a busy machine leaves comparable."""

    def cpu_s(self) -> float:
        return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in self.pids)


@contextmanager
def mesh(model: str, *assignments: str, checkout: str = "") -> Iterator[Side]:
    environment = dict(os.environ)
    if checkout:
        environment["PYTHONPATH"] = str(Path(checkout).resolve() / ".src")
    with tempfile.TemporaryDirectory(prefix="locked-") as home:
        given = [f"model.path={model}", "model.name=m", "index.address=tcp://127.0.0.1:0", "gateway.port=0"]
        given += ["router.address=tcp://127.0.0.1:0", "mesh.engines=2", *assignments]
        command = [sys.executable, "-P", "-m", "microserve.services"]
        flags = [word for each in given for word in ("--set", each)]
        subprocess.run(
            [*command, "up", "--detach", "--no-demo", *flags],
            cwd=home,
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        try:
            state = MeshDirectory(Path(home) / ".microserve").read()
            assert state is not None
            yield Side(state.url, [child.pid for child in state.children])
        finally:
            subprocess.run([*command, "down"], cwd=home, check=True, stdout=subprocess.DEVNULL)


async def ask(client: httpx.AsyncClient, side: Side, prompt: list[int], tokens: int, strategy: str) -> int:
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
    headers = {"x-microserve-strategy": strategy}
    lines = 0
    async with client.stream(
        "POST", f"{side.url}/v1/completions", json=body | {"stream": True}, headers=headers
    ) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            lines += line.startswith("data: {")
    return tokens if lines else 0


async def play(side: Side, number: int, streams: int, tokens: int) -> None:
    async with httpx.AsyncClient(timeout=600.0) as client:
        for each in range(ALONE):
            began = time.perf_counter()
            await ask(client, side, [9 + number % 50] * 24, 1, "data_parallel")
            if each >= ALONE // 4:
                side.alone_ms.append((time.perf_counter() - began) * 1000)
        prompts = [[11 + (number * streams + each) % 80] * 200 for each in range(streams)]
        strategies = ("data_parallel", "disaggregated")
        began, cpu_s = time.perf_counter(), side.cpu_s()
        counts = await asyncio.gather(
            *(ask(client, side, prompt, tokens, strategies[each % 2]) for each, prompt in enumerate(prompts))
        )
        side.rates.append(sum(counts) / (time.perf_counter() - began))
        side.cpu_ms.append((side.cpu_s() - cpu_s) / sum(counts) * 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--model", default="", help="Default: the demo model.")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--before", default="")
    options = parser.parse_args()
    model = options.model or str(fetch(default_cache(os.environ), lambda what, part: None))
    with ExitStack() as stack:
        insecure = [] if options.before else ["bus.insecure=true"]
        open_side = stack.enter_context(mesh(model, *insecure, checkout=options.before))
        locked = stack.enter_context(mesh(model))
        sides = [open_side, locked]
        for number in range(-1, options.rounds):
            for side in sides if number % 2 else reversed(sides):
                asyncio.run(play(side, number, options.streams, options.tokens))
            if number < 0:  # what is done once, by either
                for side in sides:
                    side.rates.clear()
                    side.alone_ms.clear()
                    side.cpu_ms.clear()
    for what, values in (
        ("tokens/s", "rates"),
        ("CPU ms a token", "cpu_ms"),
        ("one request alone, ms", "alone_ms"),
    ):
        without, with_keys = (statistics.median(getattr(side, values)) for side in sides)
        print(f"{what:<24} open {without:9.2f}   locked {with_keys:9.2f}   ratio {with_keys / without:.3f}")
    fastest = [statistics.quantiles(side.alone_ms, n=20)[0] for side in sides]
    print(f"{'the fastest 5 %, ms':<24} open {fastest[0]:9.2f}   locked {fastest[1]:9.2f}")
    ratios = sorted(b / a for a, b in zip(open_side.rates, locked.rates, strict=True))
    print(f"tokens/s, round by round: {' '.join(f'{each:.3f}' for each in ratios)}")


if __name__ == "__main__":
    main()
