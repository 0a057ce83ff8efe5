"""A server that speaks as ``vllm serve`` does, from a script: what it is asked is kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Write = Callable[[bytes], None]

MODEL = "tiny"
VOCAB = 512


def tokens_of(prompt: list[int], number: int) -> list[int]:
    """What it generates: each token follows from the prompt and its place."""
    return [(sum(prompt) + 7 * place) % VOCAB for place in range(number)]


@dataclass
class ScriptedServe:
    port: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of requests to generate."""
    refusals: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """Status and body for the next ones, instead of tokens."""
    breaks_after: int | None = None
    """Tokens after which a stream breaks off."""
    holds_after: int | None = None
    """Tokens after which a stream waits until its client has gone."""
    is_ill: bool = False
    num_left: int = 0
    """Streams whose clients went before the end."""
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": MODEL, "max_model_len": 256}])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def run(self) -> AsyncIterator[ScriptedServe]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = int(
                next(line for line in head.splitlines() if line.startswith("Content-Length")).split()[1]
            )
            body = json.loads(await reader.readexactly(length)) if length else None
            await self._answer(head.split()[1], body, reader, writer)
            await writer.drain()
        except (OSError, EOFError):
            pass
        finally:
            writer.close()

    async def _answer(
        self, path: str, body: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if path == "/v1/models":
            _whole(writer.write, 200, {"data": self.models})
        elif path == "/version":
            _whole(writer.write, 200, {"version": "0.32.0"})
        elif path == "/health":
            _whole(writer.write, 503 if self.is_ill else 200, {})
        elif path == "/metrics":
            text = 'vllm:cache_config_info{block_size="32",num_gpu_blocks="40"} 1.0\n'
            _whole(writer.write, 200, text + f"vllm:iterations {len(self.asked)}\n")
        elif path != "/inference/v1/generate":
            _whole(writer.write, 404, {"detail": "Not Found"})
        elif self.refusals:
            status, refusal = self.refusals.pop(0)
            _whole(writer.write, status, refusal)
        else:
            self.asked.append(body)
            await self._generate(body, reader, writer)

    async def _generate(
        self, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n"
        )
        sampling, given = (
            body["sampling_params"],
            tokens_of(body["token_ids"], body["sampling_params"]["max_tokens"]),
        )
        for place, token in enumerate(given):
            if place == self.breaks_after:
                return
            if place == self.holds_after:
                await writer.drain()
                assert await reader.read() == b""
                self.num_left += 1
                return
            is_stop = token in sampling.get("stop_token_ids", ())
            is_last = is_stop or place == len(given) - 1
            choice = {"index": 0, "token_ids": [token], "finish_reason": None, "logprobs": None}
            if is_last:
                choice |= {
                    "finish_reason": "stop" if is_stop else "length",
                    "stop_reason": token if is_stop else None,
                }
            if (number := sampling.get("logprobs")) is not None:
                choice["logprobs"] = {"content": [_rated(token, number)]}
            _event(writer.write, json.dumps({"request_id": "r", "choices": [choice]}).encode())
            if is_last:
                break
        _event(writer.write, b"[DONE]")
        writer.write(b"0\r\n\r\n")


def _rated(token: int, number: int) -> dict[str, Any]:
    """The chosen token is the third likeliest: as vLLM lists it, first and among ``max(number, 1)``."""
    others = [(token + place, rank) for place, rank in ((1, 1), (2, 2), (3, 4), (4, 5))]
    listed = [(token, 3), *others][: max(number, 1)]
    top = [{"token_id": each, "logprob": -float(rank), "rank": rank} for each, rank in listed]
    return {"token_id": token, "logprob": -3.0, "rank": 3, "top_logprobs": top}


def _whole(write: Write, status: int, body: dict[str, Any] | str) -> None:
    content = (body if isinstance(body, str) else json.dumps(body)).encode()
    write(f"HTTP/1.1 {status} Said\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)


def _event(write: Write, data: bytes) -> None:
    """In two chunks, which need not be where events end."""
    text = b"data: " + data + b"\n\n"
    for part in (text[:5], text[5:]):
        write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
