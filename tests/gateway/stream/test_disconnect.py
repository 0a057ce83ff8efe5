"""A client that goes, in every phase: its request is cancelled on the bus, and nothing of it is left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs
from tokenizers import Tokenizer

from microserve.gateway.http import sse
from microserve.protocol import log
from tests.support.gateway.gateway_world import Connection, GatewayWorld, connect, gateway_world, post, run

pytestmark = pytest.mark.slow


CUTS: list[Callable[[Connection], None]] = [Connection.close, Connection.reset, Connection.half_close]


cut_in_every_way = pytest.mark.parametrize("cut", CUTS, ids=["fin", "rst", "half-close"])


async def finished(world: GatewayWorld, events: list[Any]) -> Any:
    """The one canonical line, once the gateway has written it."""
    while not (lines := [event for event in events if event["event"] == log.REQUEST_FINISHED]):
        # A request of our own: when it is answered, the loop has turned.
        async with httpx.AsyncClient() as http:
            await http.get(f"{world.address}/health")
    assert len(lines) == 1
    return lines[0]


async def nothing_is_left(world: GatewayWorld, phase: str | None) -> None:
    async with httpx.AsyncClient(base_url=world.address) as http:
        text = (await http.get("/metrics")).text
        assert 'microserve_requests_running{model_name="tiny"} 0.0' in text
        if phase is not None:
            assert f'microserve_disconnects_total{{phase="{phase}"}} 1.0' in text
        routers = (await http.get("/ready")).json()["routers"]
        assert [router["num_own_requests"] for router in routers] == [0]


@cut_in_every_way
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
def test_before_the_first_token(model: Path, cut: Callable[[Connection], None], stream: bool) -> None:
    async def main() -> None:
        with capture_logs() as events:
            async with gateway_world(model) as world:
                async with post(world, "/v1/completions", prompt="x", stream=stream, n=2) as client:
                    requests = [await world.router.request(), await world.router.request()]
                    cut(client)
                    for served in requests:
                        await served.cancelled.wait()
                while sum(event["event"] == log.REQUEST_FINISHED for event in events) < 2:
                    await asyncio.sleep(0)
                await nothing_is_left(world, "prefill")
        lines = [event for event in events if event["event"] == log.REQUEST_FINISHED]
        assert {(line["finish_reason"], line["code"], line["status"]) for line in lines} == {
            ("abort", "client_disconnected", 499)
        }

    run(main())


@cut_in_every_way
def test_behind_a_large_body(model: Path, cut: Callable[[Connection], None]) -> None:
    """Reading may stand still while there is too much of it, and the end of a connection has to be read."""

    async def main() -> None:
        async with gateway_world(model) as world:
            async with post(world, "/v1/completions", prompt="x", user="u" * 1_000_000) as client:
                served = await world.router.request()
                cut(client)
                await served.cancelled.wait()
            await nothing_is_left(world, "prefill")

    run(main())


@cut_in_every_way
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
def test_in_the_middle(
    model: Path, raw_tokenizer: Tokenizer, cut: Callable[[Connection], None], stream: bool
) -> None:
    async def main() -> None:
        with capture_logs() as events:
            async with gateway_world(model) as world:
                async with post(world, "/v1/completions", prompt="x", stream=stream) as client:
                    served = await world.router.request()
                    served.send(raw_tokenizer.encode("abc").ids)
                    if stream:
                        await client.head()
                        await client.chunk()
                    cut(client)
                    await served.cancelled.wait()
                line = await finished(world, events)
                await nothing_is_left(world, "decode" if stream else None)
                assert (line["finish_reason"], line["code"]) == ("abort", "client_disconnected")
                # The router's account of the cancelled request came in time.
                assert line["engines"] == ["e0", "e1"]

    run(main())


def test_while_the_prompt_is_tokenised(model: Path) -> None:
    """The prompt is long enough for a thread; the client goes at once, and nothing is ever sent."""

    async def main() -> None:
        with capture_logs() as events:
            async with gateway_world(model, max_model_len=2_000_000) as world:
                prompt = "the quick brown fox " * 40_000
                async with post(world, "/v1/completions", prompt=prompt) as client:
                    client.reset()
                line = await finished(world, events)
                await nothing_is_left(world, "queued")
                assert line["code"] == "client_disconnected"
                assert world.router.served == {}

    run(main())


def test_while_the_body_is_sent(model: Path) -> None:
    async def main() -> None:
        with capture_logs() as events:
            async with gateway_world(model) as world:
                async with connect(world) as client:
                    await client.send(
                        b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 99\r\n\r\n{"
                    )
                    client.close()
                line = await finished(world, events)
                assert line["code"] == "client_disconnected"
                await nothing_is_left(world, "queued")

    run(main())


def test_a_router_that_does_not_confirm_holds_nothing_up(model: Path) -> None:
    async def main() -> None:
        with capture_logs() as events:
            async with gateway_world(model, confirm_cancels=False) as world:
                async with post(world, "/v1/completions", prompt="x") as client:
                    served = await world.router.request()
                    client.close()
                    await served.cancelled.wait()
                await finished(world, events)
                await nothing_is_left(world, "prefill")

    run(main())


def test_a_pipelining_client_that_goes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server stops reading behind a second request, so that only a write meets the closed connection:
    here the pings of a stream that still waits."""
    monkeypatch.setattr(sse, "PING_S", 0.05)

    async def main() -> None:
        with capture_logs() as events:
            async with gateway_world(model) as world:
                async with post(world, "/v1/completions", prompt="x", stream=True) as client:
                    served = await world.router.request()
                    await client.send(b"GET /health HTTP/1.1\r\nhost: t\r\n\r\n")
                    async with httpx.AsyncClient() as http:  # the second request has been read by now
                        await http.get(f"{world.address}/health")
                    client.reset()
                    await served.cancelled.wait()
                line = await finished(world, events)
                await nothing_is_left(world, "prefill")
        assert line["code"] == "client_disconnected"
        assert not [event for event in events if event["event"] == log.SERVICE_FAILED]

    run(main())


def test_a_client_that_stays_is_not_taken_for_gone(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model) as world:
            async with httpx.AsyncClient(base_url=world.address) as http:
                for _ in range(3):  # one connection, kept alive
                    call = asyncio.ensure_future(
                        http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
                    )
                    served = await world.router.request()
                    served.send(raw_tokenizer.encode("ok").ids)
                    served.end("length")
                    assert (await call).json()["choices"][0]["text"] == "ok"
            assert world.router.cancels == []

    run(main())
