"""A real mesh for a benchmark, and streams through its gateway with the time of every event.

Owns the processes of ``microserve up``, which end with the context. Client and mesh share the machine, as the
client of a peer in one process does.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from microserve.services.local.directory import MeshDirectory

TIMEOUT_S = 1800.0


@dataclass
class Stream:
    """Of one request. Times are seconds since all were sent."""

    times: list[float]
    """Of each piece that came, in order."""
    num_tokens: int
    """In all pieces together."""


@dataclass
class Steady:
    """The part of a load in which every stream decodes and none has ended."""

    tokens_per_s: float
    tokens_an_event: float
    first_token_s: float
    """Mean over the streams, with what they waited for each other."""


def steady(streams: list[Stream]) -> Steady:
    """Raises :class:`RuntimeError` where some stream ended before another one had begun."""
    begin = max(stream.times[0] for stream in streams)
    end = min(stream.times[-1] for stream in streams)
    if end <= begin:
        raise RuntimeError("no part of the load had all streams decoding: ask for more tokens")
    num_events = sum(len(stream.times) for stream in streams)
    an_event = sum(stream.num_tokens for stream in streams) / num_events
    counted = sum(sum(begin < at <= end for at in stream.times) for stream in streams)
    first_s = sum(stream.times[0] for stream in streams) / len(streams)
    return Steady(counted * an_event / (end - begin), an_event, first_s)


class Prompts:
    """Drawn ids of a model's vocabulary: no prefix comes twice, and what they say does not matter."""

    def __init__(self, model: str, seed: int) -> None:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        self._vocab = int(config["vocab_size"])
        self._chance = random.Random(seed)

    def draw(self, count: int, num_tokens: int) -> list[list[int]]:
        return [[self._chance.randrange(self._vocab) for _ in range(num_tokens)] for _ in range(count)]


@dataclass
class Mesh:
    url: str

    def play(self, prompts: list[list[int]], num_tokens: int) -> list[Stream]:
        """All at once, greedy, ``ignore_eos``."""
        return asyncio.run(self._play(prompts, num_tokens))

    async def _play(self, prompts: list[list[int]], num_tokens: int) -> list[Stream]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits) as client:
            began = time.perf_counter()
            return await asyncio.gather(*(self._ask(client, each, num_tokens, began) for each in prompts))

    async def _ask(
        self, client: httpx.AsyncClient, prompt: list[int], num_tokens: int, began: float
    ) -> Stream:
        body = {"model": "bench", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0.0}
        body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        times, counted = [], 0
        async with client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            if response.is_error:
                raise RuntimeError((await response.aread()).decode())
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if event["choices"] and event["choices"][0]["finish_reason"] is None:
                    times.append(time.perf_counter() - began)
                elif event.get("usage"):
                    counted = event["usage"]["completion_tokens"]
        if counted != num_tokens:
            raise RuntimeError(f"{counted} tokens of {num_tokens} came")
        return Stream(times, counted)


@contextmanager
def mesh(model: str, num_engines: int, threads: int, dtype: str, *assignments: str) -> Iterator[Mesh]:
    """As ``microserve up`` makes it. Raises :class:`CalledProcessError` where it does not start."""
    with tempfile.TemporaryDirectory(prefix="engine-bench-") as home:
        given = [
            f"model.path={model}",
            "model.name=bench",
            f"model.dtype={dtype}",
            f"mesh.engines={num_engines}",
        ]
        given += [f"engine.threads={threads}", "gateway.port=0", "kvcache.num_blocks=2048"]
        given += ["index.address=tcp://127.0.0.1:0", "router.address=tcp://127.0.0.1:0", *assignments]
        command = [sys.executable, "-P", "-m", "microserve.services"]
        flags = [word for each in given for word in ("--set", each)]
        up = [*command, "up", "--detach", "--no-demo", *flags]
        subprocess.run(up, cwd=home, check=True, stdout=subprocess.DEVNULL)
        try:
            state = MeshDirectory(Path(home) / ".microserve").read()
            assert state is not None
            yield Mesh(state.url)
        finally:
            subprocess.run([*command, "down"], cwd=home, check=True, stdout=subprocess.DEVNULL)
