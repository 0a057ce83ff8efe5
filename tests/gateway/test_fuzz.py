"""Bodies from nowhere: whatever is sent, the answer is JSON, never a 5xx, and the next request is served."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microserve.gateway.anthropic.schema import MessagesRequest
from microserve.gateway.openai.schema import ChatRequest, CompletionRequest
from tests.support.gateway.gateway_world import connect, gateway_world

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PLAUSIBLE = st.one_of(
    st.integers(-2, 40), st.floats(-2, 2), st.booleans(), st.sampled_from(["", "x", "😀", "tiny"]),
    st.lists(st.integers(-1, 300) | st.text(max_size=3), max_size=3),
    st.dictionaries(st.integers(-1, 300).map(str), st.floats(-200, 200), max_size=3),
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "system", "tool"]), "content": st.text(max_size=5) | JSON}
        ),
        max_size=3,
    ),
)  # fmt: skip
KINDS = (ChatRequest, CompletionRequest, MessagesRequest)
NAMES = st.sampled_from(
    sorted({name for kind in KINDS for name in kind.__struct_fields__} | {"tools", "echo", "zzz"})
)
WHOLE = {"model": "tiny", "max_tokens": 5}
REQUEST = st.dictionaries(NAMES, PLAUSIBLE | JSON, max_size=6)
PATHS = st.sampled_from(
    [
        *("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/messages/count_tokens"),
        *("/tokenize", "/detokenize"),
    ]
)


class Live:
    """One gateway for many examples, on a loop that turns only while an example runs."""

    def __init__(self, runner: asyncio.Runner, directory: Path) -> None:
        self._runner = runner
        self._stack = AsyncExitStack()
        runner.run(self._open(directory))

    async def _open(self, directory: Path) -> None:
        self.world = await self._stack.enter_async_context(gateway_world(directory))
        self.http = await self._stack.enter_async_context(
            httpx.AsyncClient(base_url=self.world.address, timeout=20.0)
        )
        self.world.router.answer = lambda served: served.end("length")

    def post(self, path: str, content: bytes) -> httpx.Response:
        return self._runner.run(self.http.post(path, content=content))

    def send(self, data: bytes) -> bytes:
        """What comes back for bytes that may not be HTTP at all."""

        async def main() -> bytes:
            async with connect(self.world) as client:
                await client.send(data)
                client.half_close()
                return await client.reader.read()

        return self._runner.run(main())

    def close(self) -> None:
        self._runner.run(self._stack.aclose())


@pytest.fixture(scope="module")
def live(model: Path) -> Iterator[Live]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        server = Live(runner, model)
        try:
            yield server
        finally:
            server.close()


def is_well_formed(reply: httpx.Response) -> bool:
    """A result, or an envelope of the caller's fault."""
    if reply.headers["content-type"].startswith("text/event-stream"):
        ends = ("data: [DONE]\n\n", 'data: {"type":"message_stop"}\n\n')
        return reply.status_code == 200 and reply.text.endswith(ends)
    body = reply.json()
    if reply.status_code == 200:
        return "error" not in body
    error: dict[str, Any] = body["error"]
    is_messages = "/v1/messages" in str(reply.url)
    assert set(body) == ({"type", "error"} if is_messages else {"error"})
    if is_messages and error["param"] == "thread":  # by which Anthropic's client knows how to go on
        del error["details"]
    return reply.status_code in (400, 404, 413) and set(error) == {"message", "type", "param", "code"}


live_settings = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(path=PATHS, content=st.binary(max_size=300))
@live_settings
def test_any_bytes(live: Live, path: str, content: bytes) -> None:
    assert is_well_formed(live.post(path, content))


@given(path=PATHS, body=REQUEST)
@live_settings
def test_any_fields(live: Live, path: str, body: dict[str, Any]) -> None:
    whole: dict[str, Any] = WHOLE | {"messages": [{"role": "user", "content": "x"}], "prompt": "x"}
    content = json.dumps(whole | body).encode("utf-8", "surrogatepass")
    assert is_well_formed(live.post(path, content))


@given(path=PATHS, body=REQUEST, position=st.integers(0, 200), byte=st.integers(0, 255))
@live_settings
def test_a_bent_byte(live: Live, path: str, body: dict[str, Any], position: int, byte: int) -> None:
    whole: dict[str, Any] = WHOLE | {"messages": [{"role": "user", "content": "é"}], "prompt": "é"}
    content = bytearray(json.dumps(whole | body, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    content[position % len(content)] = byte
    assert is_well_formed(live.post(path, bytes(content)))


@given(data=st.binary(max_size=200))
@live_settings
def test_any_bytes_instead_of_http(live: Live, data: bytes) -> None:
    answer = live.send(data)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize(
    "data",
    [
        b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: " + b"9" * 400 + b"\r\n\r\n",
        b"GET /%ff%00 HTTP/1.1\r\nhost: t\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: t\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: t\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    ],
)
def test_what_is_nearly_http_leaves_the_gateway_alive(live: Live, data: bytes) -> None:
    live.send(data)
    assert live.post("/v1/completions", b'{"model":"tiny","prompt":"x"}').status_code == 200
