"""The demo's HTTP against real sockets: whole and chunked bodies, errors, streams that break off."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from microserve.services.local.demo.request import Answer, DemoFailed, Gateway
from tests.support.gateway.certificate import make_pair

TIMEOUT_S = 20.0


def chunked(*pieces: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


def whole(body: bytes, status: str = "200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


def event(content: str) -> bytes:
    return b'data: {"choices": [{"index": 0, "delta": {"content": "%s"}}]}\n\n' % content.encode()


USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\n'
DONE = b"data: [DONE]\n\n"


def against(
    responses: list[bytes], test: Callable[[Gateway], Coroutine[Any, Any, None]], *pair: Path
) -> list[bytes]:
    """Run ``test`` against a server that gives these responses in turn; returns the request heads. With a
    certificate and its key it speaks TLS."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(responses.pop(0))
        await writer.drain()
        writer.close()

    async def run() -> None:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) if pair else None
        if tls is not None:
            tls.load_cert_chain(pair[0], pair[1])
        async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls) as server:
            port = server.sockets[0].getsockname()[1]
            await test(Gateway("127.0.0.1", port, "sk-1", str(pair[0]) if pair else ""))

    asyncio.run(asyncio.wait_for(run(), TIMEOUT_S))
    return requests


def test_a_streamed_answer_is_shown_piece_by_piece() -> None:
    shown: list[str] = []
    answers: list[Answer] = []

    async def test(gateway: Gateway) -> None:
        answers.append(await gateway.chat(await gateway.model(), "Hello?", shown.append))

    stream = event("Par") + event("ü s.") + USAGE + DONE
    # Borders of chunks need not be borders of lines, nor of characters.
    pieces = [stream[begin : begin + 7] for begin in range(0, len(stream), 7)]
    requests = against([whole(b'{"data": [{"id": "tiny"}]}'), chunked(*pieces, b"")], test)
    assert shown == ["Par", "ü s."]
    assert (answers[0].text, answers[0].num_tokens) == ("Parü s.", 2)
    assert 0 < answers[0].first_token_s <= answers[0].total_s
    assert requests[1].startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    assert b"authorization: Bearer sk-1\r\n" in requests[1]


@pytest.mark.parametrize(
    ("response", "why"),
    [
        (whole(b'{"error": {"message": "no such model"}}', "404 Not Found"), "answered 404.*no such model"),
        (chunked(event("Par"), USAGE, b""), "ended early"),
        (chunked(event("Par")), "/v1/chat/completions"),
        (chunked(b'data: {"error": {"code": "engine_lost"}}\n\n', b""), "broke off.*engine_lost"),
        (b"", "/v1/chat/completions"),
        (b"what?\r\n\r\n", "/v1/chat/completions"),
    ],
)
def test_everything_but_a_whole_answer_fails(response: bytes, why: str) -> None:
    async def test(gateway: Gateway) -> None:
        with pytest.raises(DemoFailed, match=why):
            await gateway.chat("tiny", "Hello?", lambda piece: None)

    against([response], test)


def test_waits_until_ready() -> None:
    async def test(gateway: Gateway) -> None:
        await gateway.until_ready(TIMEOUT_S, interval_s=0.01)

    requests = against([whole(b"no engines", "503 Unavailable"), whole(b"ok")], test)
    assert len(requests) == 2


def test_never_ready_says_why() -> None:
    async def test(gateway: Gateway) -> None:
        with pytest.raises(DemoFailed, match=r"not ready after 0\.2 s: .*no engines"):
            await gateway.until_ready(0.2, interval_s=0.01)

    against([whole(b"no engines", "503 Unavailable") for _ in range(1000)], test)


def test_urls_read_back() -> None:
    for gateway in (Gateway("127.0.0.1", 8000, "k"), Gateway("::1", 81, "k")):
        assert Gateway.at(gateway.url, "k") == gateway


def test_it_asks_a_gateway_with_a_certificate_and_no_other(tmp_path: Path) -> None:
    pair, other = make_pair(tmp_path, "mesh"), make_pair(tmp_path, "other")

    async def test(gateway: Gateway) -> None:
        assert gateway.url.startswith("https://")
        assert Gateway.at(gateway.url, "sk-1", gateway.tls_cert) == gateway
        assert await gateway.model() == "tiny"
        with pytest.raises(DemoFailed, match="CERTIFICATE_VERIFY_FAILED"):
            await replace(gateway, tls_cert=str(other[0])).model()

    against([whole(b'{"data": [{"id": "tiny"}]}')], test, *pair)
