"""Streams of a mesh's gateway, as a client sees them: how much came, and how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import httpx

from tests.support.vllm.mesh import VllmMesh

NUM_TOKENS = 120
SERVED_S = 240.0

_seeds = itertools.count(1)


def new_prompt(length: int) -> list[int]:
    """That nobody has in a cache."""
    return random.Random(next(_seeds)).choices(range(20, 250), k=length)


@dataclass
class Stream:
    """A streamed completion, as a client sees it."""

    prompt: list[int]
    text: str = ""
    num_pieces: int = 0
    finish: str | None = None
    num_tokens: int | None = None
    """As the end of the stream says."""
    request_id: str = ""
    problem: str = ""
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, line: str) -> None:
        if not line.startswith("data: ") or line == "data: [DONE]":
            return
        event = json.loads(line.removeprefix("data: "))
        self.problem = self.problem or json.dumps(event.get("error") or "").strip('"')
        for choice in event.get("choices", []):
            assert not (self.finish and choice["text"]), "text behind the end"
            self.text += choice["text"]
            self.num_pieces += bool(choice["text"])
            self.finish = choice["finish_reason"] or self.finish
        if event.get("usage"):
            self.num_tokens = event["usage"]["completion_tokens"]

    @property
    def outcome(self) -> tuple[str, str | None, int | None]:
        return self.problem, self.finish, self.num_tokens


WHOLE = ("", "length", NUM_TOKENS)


@contextlib.asynccontextmanager
async def streaming(mesh: VllmMesh, prompt: list[int], strategy: str) -> AsyncIterator[Stream]:
    """Under way inside of it."""
    stream = Stream(prompt)

    async def read() -> None:
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"x-microserve-strategy": strategy}
        try:
            async with (
                httpx.AsyncClient(timeout=SERVED_S) as client,
                client.stream(
                    "POST", f"{mesh.state.url}/v1/completions", json=body, headers=headers
                ) as answer,
            ):
                stream.request_id = answer.headers["x-request-id"]
                if answer.status_code != 200:
                    stream.problem = (await answer.aread()).decode()
                    return
                async for line in answer.aiter_lines():
                    stream.take(line)
        except httpx.HTTPError as error:
            stream.problem = repr(error)
        finally:
            stream.done.set()

    reading = asyncio.create_task(read())
    try:
        yield stream
    finally:
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading


async def serve(mesh: VllmMesh, prompt: list[int], strategy: str) -> Stream:
    async with streaming(mesh, prompt, strategy) as stream, asyncio.timeout(SERVED_S):
        await stream.done.wait()
    return stream
