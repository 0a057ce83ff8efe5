"""One real chat request to the gateway, by plain HTTP/1.1: the proof at the end of ``microserve up``.

Owns just enough of HTTP for that, so that the supervisor needs no client package; not a client for others.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

PROMPT = "Write a haiku about the sea."
MAX_TOKENS = 64


class DemoFailed(Exception):
    """The mesh did not answer as it should."""


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    num_tokens: int
    first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Gateway:
    """Where to ask, and with which key."""

    host: str
    port: int
    api_key: str = ""
    tls_cert: str = ""
    """File with the certificate that it must show; empty: it does not speak TLS."""

    @classmethod
    def at(cls, url: str, api_key: str = "", tls_cert: str = "") -> Gateway:
        """``url`` as :attr:`url` gives it."""
        host, _, port = url.partition("://")[2].rpartition(":")
        return cls(host.strip("[]"), int(port), api_key, tls_cert)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls_cert else 'http'}://{host}:{self.port}"

    async def lines(self, path: str, body: Any = None) -> AsyncGenerator[str, None]:
        """The response's body, line by line as it comes. Raises :class:`DemoFailed` unless it is a 200."""
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port, ssl=self._tls())
        except OSError as error:
            raise DemoFailed(f"{self.url}: {error}") from error
        try:
            content = b"" if body is None else msgspec.json.encode(body)
            head = [
                f"{'GET' if body is None else 'POST'} {path} HTTP/1.1",
                f"host: {self.host}:{self.port}",
                "connection: close",
                "content-type: application/json",
                f"content-length: {len(content)}",
            ]
            if self.api_key:
                head.append(f"authorization: Bearer {self.api_key}")
            writer.write("\r\n".join([*head, "", ""]).encode() + content)
            status = int((await reader.readline()).split()[1])
            headers = (await reader.readuntil(b"\r\n\r\n")).lower()
            pieces = _chunks(reader) if b"transfer-encoding: chunked" in headers else _rest(reader)
            if status != 200:
                detail = b"".join([piece async for piece in pieces]).decode(errors="replace")
                raise DemoFailed(f"{path} answered {status}: {detail}")
            buffered = b""
            async with aclosing(pieces):
                async for piece in pieces:
                    *lines, buffered = (buffered + piece).split(b"\n")
                    for line in lines:
                        yield line.decode()
            if buffered:
                yield buffered.decode()
        except (ValueError, IndexError, EOFError, OSError) as error:
            raise DemoFailed(f"{path}: {error or 'the connection was closed'}") from error
        finally:
            writer.close()

    def _tls(self) -> ssl.SSLContext | None:
        """Whoever shows the very certificate of the settings is the gateway, whatever name is in it."""
        if not self.tls_cert:
            return None
        context = ssl.create_default_context(cafile=self.tls_cert)
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        return context

    async def _text(self, path: str) -> str:
        async with aclosing(self.lines(path)) as lines:
            return "\n".join([line async for line in lines])

    async def until_ready(self, timeout_s: float, *, interval_s: float = 0.1) -> None:
        """Wait until ``/ready`` says that an engine can be reached. Raises :class:`DemoFailed`."""
        detail = "no answer"
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        await self._text("/ready")
                        return
                    except DemoFailed as error:
                        detail = str(error)
                    await asyncio.sleep(interval_s)
        except TimeoutError:
            raise DemoFailed(f"the gateway is not ready after {timeout_s:g} s: {detail}") from None

    async def model(self) -> str:
        """The id of the model that is served."""
        models = msgspec.json.decode(await self._text("/v1/models"))["data"]
        if not models:
            raise DemoFailed("/v1/models lists no model")
        return str(models[0]["id"])

    async def chat(self, model: str, prompt: str, show: Callable[[str], None]) -> Answer:
        """Stream one greedy answer; ``show`` gets each piece of text as it comes."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        began = time.monotonic()
        first_token_s, num_tokens, text, done = 0.0, 0, "", False
        async with aclosing(self.lines("/v1/chat/completions", body)) as lines:
            async for line in lines:
                data = line.removeprefix("data: ").strip() if line.startswith("data: ") else ""
                if data == "[DONE]":
                    done = True
                elif data:
                    event = msgspec.json.decode(data)
                    if "error" in event:
                        raise DemoFailed(f"the stream broke off: {event['error']}")
                    num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
                    piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                    if piece:
                        first_token_s = first_token_s or time.monotonic() - began
                        text += piece
                        show(piece)
        if not done or num_tokens == 0:
            raise DemoFailed(f"the stream ended early, after {num_tokens} tokens")
        return Answer(text, num_tokens, first_token_s, time.monotonic() - began)


async def _chunks(reader: asyncio.StreamReader) -> AsyncGenerator[bytes, None]:
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _rest(reader: asyncio.StreamReader) -> AsyncGenerator[bytes, None]:
    while piece := await reader.read(65536):
        yield piece
