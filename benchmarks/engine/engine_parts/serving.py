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
from typing import Any

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
    logs: Path | None = None
    """Where its services write, of a mesh."""

    def play(self, prompts: list[list[int]], num_tokens: int) -> list[Stream]:
        """All at once, greedy, ``ignore_eos``."""
        return asyncio.run(self._play(prompts, num_tokens))

    def finished(self) -> list[dict[str, Any]]:
        """The gateway's canonical lines, of all requests so far."""
        assert self.logs is not None, "only a mesh has them"
        lines = [json.loads(line) for line in (self.logs / "gateway.jsonl").read_text().splitlines()]
        return [line for line in lines if line["event"] == "request.finished"]

    async def _play(self, prompts: list[list[int]], num_tokens: int) -> list[Stream]:
        clients = [await connect(self.url) for _ in prompts]
        began = time.perf_counter()
        for client, prompt in zip(clients, prompts, strict=True):
            client.ask(prompt, num_tokens)
        return [(await client.answer()).stream(began, num_tokens) for client in clients]


async def connect(url: str) -> Client:
    host, _, port = url.rpartition("/")[2].rpartition(":")
    return (await asyncio.get_running_loop().create_connection(Client, host, int(port)))[1]


class Client(asyncio.Protocol):
    """One streamed request. Keeps what comes with its time, and reads it when all is over: what a client
    takes of the machine would be counted as the mesh's."""

    def __init__(self) -> None:
        self._parts: list[tuple[float, bytes]] = []
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def ask(self, prompt: list[int], num_tokens: int, **more: object) -> None:
        """``more``: other fields of the body."""
        body = {"model": "bench", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0.0}
        body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        body |= more
        content = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(content)}\r\n\r\n"
        self._transport.write(head.encode() + content)

    def data_received(self, data: bytes) -> None:
        self._parts.append((time.perf_counter(), data))
        if b"".join(part for _, part in self._parts[-2:]).endswith(b"\r\n0\r\n\r\n"):
            self._over.set_result(None)
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._over.done():
            self._over.set_exception(RuntimeError(b"".join(data for _, data in self._parts).decode()))

    async def answer(self) -> Client:
        """Raises :class:`RuntimeError` with what there is of one that is not whole."""
        async with asyncio.timeout(TIMEOUT_S):
            await self._over
        return self

    def stream(self, began: float, num_tokens: int) -> Stream:
        times, counted, left = [], 0, b""
        for at, data in self._parts:
            *events, left = (left + data).split(b"\n\n")
            for each in events:
                found = each.find(b"data: {")
                event = json.loads(each[found + 6 :]) if found >= 0 else {}
                if event.get("choices") and event["choices"][0]["finish_reason"] is None:
                    times.append(at - began)
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
            yield Mesh(state.url, Path(home) / ".microserve" / "logs")
        finally:
            subprocess.run([*command, "down"], cwd=home, check=True, stdout=subprocess.DEVNULL)
