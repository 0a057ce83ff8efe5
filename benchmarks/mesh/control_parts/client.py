"""A client that costs little: HTTP/1.1 on connections that are kept, an answer read no further than needed.

Owns the connections of one load; ``ask`` raises for any answer that is not a whole 200.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

_PAGES = Path(__file__).parents[3] / "docs"


def prompts(seed: int, num_chars: int) -> Iterator[str]:
    """Sentences of this project's own pages, shuffled: ordinary text, and no two begin alike."""
    rng = random.Random(seed)
    sentences = [each for page in sorted(_PAGES.glob("*.md")) for each in page.read_text().split(". ")]
    while True:
        text = f"{rng.randrange(10**9)} "
        while len(text) < num_chars:
            text += rng.choice(sentences) + ". "
        yield text[:num_chars]


def request(path: str, body: dict[str, Any], headers: tuple[str, ...] = ()) -> bytes:
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: bench", "content-type: application/json", *headers]
    lines.append(f"content-length: {len(content)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


class Connection(asyncio.Protocol):
    """One at a time."""

    @classmethod
    async def open(cls, url: str) -> Connection:
        host, _, port = url.rpartition("/")[2].rpartition(":")
        _, made = await asyncio.get_running_loop().create_connection(cls, host, int(port))
        return made

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._begin()

    def _begin(self) -> None:
        self._answer = bytearray()
        self._end = -1
        self._is_chunked = False
        self._waiter: asyncio.Future[bytes] | None = None

    async def ask(self, content: bytes) -> bytes:
        """The whole answer, head and all."""
        self._begin()
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(content)
        return await self._waiter

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        answer += data
        if self._end < 0 and not self._is_chunked:
            head = answer.find(b"\r\n\r\n")
            if head < 0:
                return
            lines = bytes(answer[:head]).lower()
            self._is_chunked = b"transfer-encoding: chunked" in lines
            if not self._is_chunked:
                self._end = head + 4 + int(lines.partition(b"content-length:")[2].split(b"\r\n")[0])
        if answer.endswith(b"\r\n0\r\n\r\n") if self._is_chunked else len(answer) >= self._end:
            assert self._waiter is not None
            if answer.startswith(b"HTTP/1.1 200"):
                self._waiter.set_result(bytes(answer))
            else:
                self._waiter.set_exception(RuntimeError(bytes(answer[:1000]).decode()))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(exc or ConnectionError("the server closed the connection"))

    def close(self) -> None:
        self._transport.close()


async def drive(url: str, contents: list[bytes], num_at_once: int) -> tuple[list[float], list[bytes], float]:
    """Every request once, ``num_at_once`` in flight: seconds of each, answers, seconds of all."""
    took_s: list[float] = []
    answers: list[bytes] = []
    waiting = iter(contents)

    async def run(connection: Connection) -> None:
        for content in waiting:
            began = perf_counter()
            answers.append(await connection.ask(content))
            took_s.append(perf_counter() - began)

    connections = [await Connection.open(url) for _ in range(num_at_once)]
    began = perf_counter()
    try:
        await asyncio.gather(*map(run, connections))
    finally:
        for connection in connections:
            connection.close()
    return took_s, answers, perf_counter() - began
