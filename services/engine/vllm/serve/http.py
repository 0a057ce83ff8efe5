"""HTTP/1.1 to one server: an answer as JSON, or as server-sent events while they come.

Owns just enough of HTTP for that, one connection a request, so that an engine needs no client package. A
connection that is closed early is how the server learns that nobody listens any more.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

MAX_LINE_NBYTES: Final = 1 << 24
"""Of an event: log-probabilities of a long prompt are one line."""
MAX_BODY_NBYTES: Final = 1 << 26


class NotAnswered(Exception):
    """The server cannot be reached, or has broken off; the text says how."""


class Refused(Exception):
    """An answer that is no 200."""

    def __init__(self, status: int, detail: str, field: str | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.field = status, detail, field


class Server:
    """Where to ask, and with which key."""

    def __init__(self, url: str, api_key: str = "", *, connect_timeout_s: float = 5.0) -> None:
        parts = urlsplit(url)
        self.url = url
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._base = parts.path.rstrip("/")
        self._head = f"Host: {parts.netloc}\r\nConnection: close\r\n"
        if api_key:
            self._head += f"Authorization: Bearer {api_key}\r\n"
        self._connect_timeout_s = connect_timeout_s

    async def ask(self, path: str, body: Any = None) -> Answer:
        """The answer once its head is there; close it. Raises :class:`NotAnswered`."""
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                reader, writer = await asyncio.open_connection(
                    self._host, self._port, ssl=self._tls, limit=MAX_LINE_NBYTES
                )
        except (OSError, TimeoutError) as error:
            raise NotAnswered(f"{self.url}: {error or 'no connection'}") from error
        answer = Answer(self.url, reader, writer)
        content = b"" if body is None else msgspec.json.encode(body)
        verb = "GET" if body is None else "POST"
        head = f"{verb} {self._base}{path} HTTP/1.1\r\n{self._head}Content-Length: {len(content)}\r\n"
        try:
            writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
            await writer.drain()
            await answer.read_head()
        except (OSError, ValueError, EOFError) as error:
            answer.close()
            raise NotAnswered(f"{self.url}: {error}") from error
        except BaseException:
            answer.close()
            raise
        return answer

    async def text(self, path: str, *, timeout_s: float) -> str:
        """The body of a 200. Raises :class:`NotAnswered` and :class:`Refused`."""
        try:
            async with asyncio.timeout(timeout_s), await self.ask(path) as answer:
                return (await answer.body()).decode("utf-8", "replace")
        except TimeoutError:
            raise NotAnswered(f"{self.url}{path}: no answer within {timeout_s:g} s") from None


class Answer:
    def __init__(self, url: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._url, self._reader, self._writer = url, reader, writer
        self.status = 0
        self._length: int | None = None
        self._is_chunked = False

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def read_head(self) -> None:
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        self.status = int(lines[0].split(" ")[1])
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)
        }
        self._is_chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        if (length := headers.get("content-length", "")).isdigit():
            self._length = int(length)

    async def body(self) -> bytes:
        """All of it. Raises :class:`Refused` unless it is of a 200."""
        content = bytearray()
        async for part in self._parts():
            content += part
            if len(content) > MAX_BODY_NBYTES:
                raise NotAnswered(f"{self._url}: more than {MAX_BODY_NBYTES} bytes")
        if self.status != 200:
            raise _refused(self.status, bytes(content))
        return bytes(content)

    async def events(self) -> AsyncIterator[bytes]:
        """The data of each server-sent event. Raises :class:`NotAnswered` where they break off."""
        rest = b""
        async for part in self._parts():
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip()
            if len(rest) > MAX_LINE_NBYTES:
                raise NotAnswered(f"{self._url}: an event of more than {MAX_LINE_NBYTES} bytes")

    async def _parts(self) -> AsyncIterator[bytes]:
        try:
            if self._is_chunked:
                while size := int((await self._reader.readline()).split(b";")[0], 16):
                    yield await self._reader.readexactly(size)
                    await self._reader.readline()
                return
            left = self._length
            while left is None or left:
                part = await self._reader.read(1 << 16 if left is None else min(left, 1 << 16))
                if not part:
                    if left is None:
                        return
                    raise EOFError("it ends in the midst")
                left = None if left is None else left - len(part)
                yield part
        except (OSError, ValueError, EOFError) as error:
            raise NotAnswered(f"{self._url}: the answer breaks off: {error}") from error

    def close(self) -> None:
        self._writer.close()


def _refused(status: int, content: bytes) -> Refused:
    """In the server's words: vLLM's ``{"error": {"message", "param"}}``, else the text."""
    try:
        read = msgspec.json.decode(content)
    except msgspec.DecodeError:
        read = None
    error = read.get("error", read) if isinstance(read, dict) else None
    if isinstance(error, dict):
        message = error.get("message") or error.get("detail") or error
        field = error.get("param")
        return Refused(status, str(message), field if isinstance(field, str) else None)
    return Refused(status, content.decode("utf-8", "replace")[:500] or f"HTTP {status}")
