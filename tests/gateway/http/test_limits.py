"""Everything has a bound, and the way down is orderly."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from microserve.gateway import server
from microserve.gateway.http import exchange
from microserve.gateway.http import server as http_server
from microserve.gateway.http.server import bind
from microserve.protocol.errors import ConfigError
from tests.support.gateway.gateway_world import GatewayWorld, Served, connect, gateway_world, post, run

pytestmark = pytest.mark.slow


BODY = {"model": "tiny", "prompt": "x"}


def http_of(world: GatewayWorld) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=world.address, timeout=20.0)


def test_bodies_are_bounded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BODY_TIMEOUT_S", 0.1)

    async def main() -> None:
        async with gateway_world(model, "gateway.max_body_mb=1") as world, http_of(world) as http:
            long = b"x" * ((1 << 20) + 1)

            async def in_pieces() -> object:
                for begin in range(0, len(long), 1 << 16):
                    yield long[begin : begin + (1 << 16)]

            for content in (long, in_pieces()):
                reply = await http.post("/v1/completions", content=content)  # type: ignore[arg-type]
                assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
            exact = b"{}" + b" " * ((1 << 20) - 2)
            assert (await http.post("/v1/completions", content=exact)).status_code == 400

            async with connect(world) as client:
                await client.send(b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 9\r\n\r\n{")
                assert (await client.head())[0] == 408

    run(main())


def test_heads_are_bounded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEAD_TIMEOUT_S", 0.2)

    async def main() -> None:
        async with gateway_world(model) as world:
            async with connect(world) as silent, connect(world) as slow:
                await slow.send(b"GET /health HTTP/1.1\r\nhost: t\r\nx-")
                assert await silent.reader.read() == await slow.reader.read() == b""
            async with connect(world) as endless:
                await endless.send(b"GET /health HTTP/1.1\r\nhost: t\r\n")
                with contextlib.suppress(ConnectionError):
                    for _ in range(100):
                        await endless.send(b"x-y: " + b"z" * 20_000 + b"\r\n")
                with contextlib.suppress(ConnectionError):
                    assert (await endless.head())[0] == 400
            # A body may take longer than a head, and a connection may rest between requests.
            monkeypatch.setattr(http_server, "HEAD_TIMEOUT_S", 0.05)
            async with connect(world) as patient:
                for _ in range(2):
                    await patient.send(
                        b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 2\r\n\r\n{"
                    )
                    await asyncio.sleep(0.15)
                    await patient.send(b"}")
                    status, headers = await patient.head()
                    assert status == 400
                    await patient.reader.readexactly(int(headers["content-length"]))
                    await asyncio.sleep(0.15)

    run(main())


@pytest.mark.parametrize(
    ("first", "dripped"),
    [
        (b"GET /health HTTP/1.1\r\nhost: t\r\n\r\n", b"\r\n"),
        (b"POST /health HTTP/1.1\r\nhost: t\r\ncontent-length: 1000000\r\n\r\n", b"x"),
    ],
    ids=["empty lines", "the body of what was refused"],
)
def test_nobody_stays_by_dripping_what_is_no_request(
    model: Path, monkeypatch: pytest.MonkeyPatch, first: bytes, dripped: bytes
) -> None:
    monkeypatch.setattr(http_server, "HEAD_TIMEOUT_S", 0.3)
    monkeypatch.setattr(http_server, "KEEP_ALIVE_S", 0.3)

    async def main() -> None:
        async with gateway_world(model) as world, connect(world) as client:
            await client.send(first)
            status, headers = await client.head()
            assert status in (200, 405)
            await client.reader.readexactly(int(headers["content-length"]))
            closed = asyncio.create_task(client.reader.read())
            async with asyncio.timeout(10.0):
                while not closed.done():
                    with contextlib.suppress(ConnectionError):
                        await client.send(dripped)
                    await asyncio.wait([closed], timeout=0.05)
            assert closed.exception() is not None or closed.result() == b""

    run(main())


def test_bodies_that_are_read_at_a_time_are_bounded_together(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_BODIES", 1)
    half = b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 1000000\r\n\r\n" + b" " * 900_000

    async def main() -> None:
        async with gateway_world(model, "gateway.max_body_mb=1") as world:
            async with connect(world) as one, connect(world) as two:
                await one.send(half)
                await two.send(half)
                heads = [asyncio.ensure_future(client.head()) for client in (one, two)]
                [done], [waiting] = await asyncio.wait(heads, return_when=asyncio.FIRST_COMPLETED)
                assert done.result()[0] == 429
                waiting.cancel()
            async with http_of(world) as http:
                assert (await http.post("/v1/completions", content=b"{}")).status_code == 400

    run(main())


def test_streams_are_bounded_and_given_back(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model, "gateway.max_streams=3") as world, http_of(world) as http:
            first = asyncio.ensure_future(http.post("/v1/completions", json=BODY | {"n": 2}))
            requests = [await world.router.request(), await world.router.request()]
            reply = await http.post("/v1/completions", json=BODY | {"n": 2})
            assert (reply.status_code, reply.json()["error"]["code"]) == (429, "queue_full")
            assert reply.headers["retry-after"] == "1"
            for served in requests:
                served.end("length")
            assert (await first).status_code == 200
            world.router.answer = lambda served: served.end("length")
            for _ in range(3):
                assert (await http.post("/v1/completions", json=BODY | {"n": 3})).status_code == 200

    run(main())


@pytest.mark.parametrize(
    ("fields", "status", "where"),
    [
        ({"prompt": "x " * 600}, 400, "prompt"),
        ({"prompt": "x " * 60_000}, 400, "prompt"),
        ({"prompt": [1] * 512}, 400, "prompt"),
        ({"max_tokens": 512}, 400, "max_tokens"),
        ({"n": 17}, 400, "n"),
        ({"prompt": ["x"] * 200, "n": 2}, 400, "n"),
        ({"model": "other"}, 404, "model"),
        ({"stop_token_ids": [1000]}, 400, "stop_token_ids"),
    ],
)
def test_requests_that_do_not_fit(
    model: Path, fields: dict[str, object], status: int, where: str | None
) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, http_of(world) as http:
            reply = await http.post("/v1/completions", json=BODY | fields)
            error = reply.json()["error"]
            assert (reply.status_code, error["param"]) == (status, where)
            if where in ("prompt", "max_tokens"):
                assert (error["type"], error["code"]) == ("invalid_request_error", "context_length_exceeded")
                assert "maximum context length is 512 tokens" in error["message"]
            assert world.router.served == {}

    run(main())


def test_a_stop_lets_streams_finish_and_takes_nothing_new(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model, drain_s=20.0) as world:
            async with (
                connect(world) as idle,
                post(world, "/v1/completions", prompt="x", stream=True) as stream,
                post(world, "/v1/completions", prompt="y") as plain,
            ):
                requests = [await world.router.request(), await world.router.request()]
                for served in requests:
                    served.send(raw_tokenizer.encode("a").ids)
                await stream.head()
                await stream.chunk()
                world.stop.set()
                assert await idle.reader.read() == b""
                with pytest.raises(OSError):
                    async with connect(world):
                        pass
                for served in requests:
                    served.send(raw_tokenizer.encode("b").ids)
                    served.end("length")
                status, headers = await plain.head()
                assert (status, headers["connection"]) == (200, "close")
                assert (await stream.events())[-1] == "[DONE]"
            await world.serving
            assert world.router.cancels == []

    run(main())


def test_a_request_that_comes_during_a_stop_is_told_so(model: Path) -> None:
    """On a connection that was open already, behind the request that runs there."""

    async def main() -> None:
        async with gateway_world(model, drain_s=20.0) as world:
            async with connect(world) as idle, connect(world) as client:
                await client.send(b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 29\r\n\r\n{")
                async with http_of(world) as http:  # the first part has been read by now
                    await http.get("/health")
                world.stop.set()
                assert await idle.reader.read() == b""
                await client.send(b'"model":"tiny","prompt":"x"}')
                # It had begun before: it is still heard, but nothing is sent any more.
                assert (await client.head())[0] == 503
            assert world.router.served == {}

    run(main())


def test_a_stop_ends_what_does_not_finish(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model, drain_s=0.3) as world:
            async with (
                post(world, "/v1/completions", prompt="x", stream=True) as stream,
                post(world, "/v1/completions", prompt="y") as plain,
            ):
                requests: list[Served] = [await world.router.request(), await world.router.request()]
                for served in requests:
                    served.send(raw_tokenizer.encode("a").ids)
                await stream.head()
                await stream.chunk()
                world.stop.set()
                assert [event["error"]["code"] for event in await stream.events()] == ["draining"]
                assert (await plain.head())[0] == 503
                for served in requests:
                    await served.cancelled.wait()
            await world.serving

    run(main())


def test_a_port_that_is_taken_is_a_wrong_setting() -> None:
    with bind("127.0.0.1", 0) as taken, pytest.raises(ConfigError) as caught:
        bind("127.0.0.1", taken.getsockname()[1])
    assert caught.value.field == "gateway.port"
    with pytest.raises(ConfigError) as caught:
        bind("no.such.host.invalid", 0)
    assert caught.value.field == "gateway.host"
