"""A server that says what the test says, chunk by chunk: enough of OpenAI's API for who only streams."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from microserve.services.command.client.endpoint import Endpoint

MODELS = {"object": "list", "data": [{"id": "scripted", "object": "model"}]}


@dataclass
class Asked:
    """One request, and the way to answer it."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    writer: asyncio.StreamWriter

    async def reply(self, status: int, body: Any, **headers: str) -> None:
        content = json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} OK", f"content-length: {len(content)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.write("\r\n".join([*lines, "", ""]).encode() + content)

    async def begin(self, **headers: str) -> None:
        lines = ["HTTP/1.1 200 OK", "content-type: text/event-stream", "transfer-encoding: chunked"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.write("\r\n".join([*lines, "", ""]).encode())

    async def say(self, text: str = "", *, finish: str | None = None, **delta: Any) -> None:
        """A chunk of a chat, or of a completion."""
        if self.path.endswith("chat/completions"):
            choice: dict[str, Any] = {"index": 0, "delta": {"content": text, **delta}}
        else:
            choice = {"index": 0, "text": text}
        await self.event({"choices": [{**choice, "finish_reason": finish}]})

    async def usage(self, prompt_tokens: int, completion_tokens: int) -> None:
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        await self.event({"choices": [], "usage": usage})

    async def event(self, data: Any) -> None:
        text = data if isinstance(data, str) else json.dumps(data)
        await self.raw(f"data: {text}\n\n".encode())

    async def raw(self, data: bytes) -> None:
        await self.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    async def done(self) -> None:
        await self.event("[DONE]")
        await self.write(b"0\r\n\r\n")

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def cut(self) -> None:
        self.writer.transport.abort()


Answer = Callable[[Asked], Awaitable[None]]


async def say_all(asked: Asked, *texts: str, usage: tuple[int, int] | None = None) -> None:
    """A whole answer, each text a token."""
    await asked.begin()
    await asked.say("")  # a role and no text, as many servers begin
    for text in texts:
        await asked.say(text)
    await asked.say(finish="length")
    prompt, output = usage or (7, len(texts))
    await asked.usage(prompt, output)
    await asked.done()


@dataclass
class ScriptedServer:
    answer: Answer
    port: int = 0
    asked: list[Asked] = field(default_factory=list)
    num_connections: int = 0

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint.at(f"http://127.0.0.1:{self.port}/v1")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while line := await reader.readline():
                method, path, _ = line.decode().split()
                lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(each.split(": ", 1) for each in lines if each)
                content = await reader.readexactly(int(headers.get("content-length", 0)))
                asked = Asked(method, path, headers, json.loads(content or b"null"), writer)
                self.asked.append(asked)
                if path == "/v1/models":
                    await asked.reply(200, MODELS)
                else:
                    await self.answer(asked)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def scripted_server(answer: Answer) -> AsyncIterator[ScriptedServer]:
    server = ScriptedServer(answer)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.port = listening.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listening.close()


@contextmanager
def served_aside(answer: Answer) -> Iterator[ScriptedServer]:
    """In a thread with a loop of its own, for who has the test's thread to itself."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    found: list[ScriptedServer] = []
    stop = asyncio.Event()

    async def main() -> None:
        async with scripted_server(answer) as server:
            found.append(server)
            ready.set()
            await stop.wait()

    def serve() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(main())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
