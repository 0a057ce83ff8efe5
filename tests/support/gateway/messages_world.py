"""A served gateway that is asked by Anthropic's Messages API, and a message as a whole and as a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.gateway.anthropic_stream import message_of
from tests.support.gateway.gateway_world import GatewayWorld, gateway_world
from tests.support.gateway.talking_model import call

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
USER: list[Any] = [{"role": "user", "content": "hi"}]
BODY: dict[str, Any] = {"model": "tiny", "max_tokens": 200, "messages": USER}
CITY = "Zürich 日本 😀"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [
    {
        "name": "weather",
        "description": "Now.",
        "input_schema": SCHEMA,
        "cache_control": {"type": "ephemeral"},
    },
    {"name": "now", "input_schema": {"type": "object"}},
]
WEATHER = call("weather", city=CITY)
THOUGHT = "<think>\nhm, now\n</think>\n\n"


@asynccontextmanager
async def served(
    model: Path, *settings: str, **router: Any
) -> AsyncIterator[tuple[GatewayWorld, httpx.AsyncClient]]:
    async with (
        gateway_world(model, *settings, **router) as world,
        httpx.AsyncClient(base_url=world.address, timeout=20.0) as http,
    ):
        yield world, http


async def both(http: httpx.AsyncClient, **fields: Any) -> Any:
    """The message as a whole, which a stream of it adds up to."""
    whole = await http.post(MESSAGES, json={**BODY, **fields})
    assert whole.status_code == 200, whole.text
    streamed = await http.post(MESSAGES, json={**BODY, **fields, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    one, other = whole.json(), message_of(streamed.content)
    assert without_ids(one) == without_ids(other)
    return one


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """Each answer has its own, and so has each call."""
    calls = [block["id"] for block in message["content"] if block["type"] == "tool_use"]
    assert len({message["id"], *calls}) == 1 + len(calls)
    return {**message, "id": "", "content": [{**block, "id": ""} for block in message["content"]]}
