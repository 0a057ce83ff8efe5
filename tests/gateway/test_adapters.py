"""A client names an adapter as its model: it is listed, asked of a router that has it, and told of."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs
from tokenizers import Tokenizer

from microserve.gateway.helper.helper import INLINE_BODY_NBYTES
from microserve.protocol import log
from microserve.protocol.messages.adapter import Adapter
from tests.support.gateway.gateway_world import GatewayWorld, ScriptedRouter, Served, gateway_world, run

SQL, POET = Adapter("sql", "r1"), Adapter("org/poet", "r2")


def http_of(world: GatewayWorld, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=world.address, timeout=20.0, **options)


async def say(router: ScriptedRouter, tokenizer: Tokenizer, text: str = "abc") -> Served:
    served = await router.request()
    served.sent = served.message.num_output_tokens
    served.send(tokenizer.encode(text).ids, ended=served.ended("length"))
    return served


async def until(world: GatewayWorld, path: str, status: int) -> httpx.Response:
    async with http_of(world) as http:
        while (reply := await http.get(path)).status_code != status:
            await world.router.next_beat()
        return reply


BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("name", "adapter"), [("tiny", ""), ("sql", "sql"), ("org/poet", "org/poet")])
def test_what_a_client_names_is_what_answers(
    model: Path, raw_tokenizer: Tokenizer, path: str, name: str, adapter: str
) -> None:
    async def main() -> None:
        async with gateway_world(model, adapters=[SQL, POET]) as world, http_of(world) as http:
            with capture_logs() as lines:
                call = asyncio.ensure_future(http.post(path, json={"model": name, **BODIES[path]}))
                served = await say(world.router, raw_tokenizer)
                reply = await call
            assert reply.status_code == 200, reply.text
            assert (served.message.model, served.message.adapter) == ("tiny", adapter)
            assert reply.json()["model"] == name
            [line] = [line for line in lines if line["event"] == log.REQUEST_FINISHED]
            assert line["model"] == name

    run(main())


def test_adapters_are_listed_beside_their_model(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model, adapters=[SQL, POET]) as world, http_of(world) as http:
            cards = (await http.get("/v1/models")).json()["data"]
            assert [(each["id"], each["parent"], each["root"]) for each in cards] == [
                ("tiny", None, "tiny"),
                ("org/poet", "tiny", "tiny"),
                ("sql", "tiny", "tiny"),
            ]
            assert (await http.get("/v1/models/org/poet")).json() == cards[1]
            schema = (await http.get("/openapi.json")).json()["components"]["schemas"]["CompletionRequest"]
            assert "sql" in str(schema["properties"]["model"])

    run(main())


@pytest.mark.parametrize("path", [*BODIES, "/tokenize"])
def test_what_is_neither_model_nor_adapter_is_not_found(model: Path, path: str) -> None:
    async def main() -> None:
        async with gateway_world(model, adapters=[SQL]) as world, http_of(world) as http:
            body = BODIES.get(path, {"prompt": "x"})
            reply = await http.post(path, json={"model": "poet", **body})
            assert reply.status_code == 404 and "'poet'" in reply.text
            assert not world.router.served

    run(main())


def test_a_large_body_may_name_one_too(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with (
            gateway_world(model, adapters=[SQL], max_model_len=1 << 20) as world,
            http_of(world) as http,
        ):
            long = "x " * (INLINE_BODY_NBYTES // 2)
            call = asyncio.ensure_future(
                http.post("/v1/completions", json={"model": "sql", "prompt": long, "max_tokens": 8})
            )
            assert (await say(world.router, raw_tokenizer)).message.adapter == "sql"
            assert (await call).json()["model"] == "sql"
            assert (await http.post("/tokenize", json={"model": "sql", "prompt": long})).status_code == 200
            reply = await http.post("/v1/completions", json={"model": "poet", "prompt": long})
            assert reply.status_code == 404

    run(main(), timeout_s=120.0)  # helpers have to start


def test_one_whose_engines_are_away_is_unavailable_and_not_unknown(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model, adapters=[SQL]) as world, http_of(world) as http:
            world.router.adapters = []
            while len((await http.get("/v1/models")).json()["data"]) > 1:
                await world.router.next_beat()
            reply = await http.post("/v1/completions", json={"model": "sql", "prompt": "x"})
            assert reply.status_code == 503 and "retry-after" in reply.headers
            assert not world.router.served

    run(main())


def test_requests_go_to_routers_that_know_it(model: Path, raw_tokenizer: Tokenizer) -> None:
    """An older router would answer by the model alone."""

    async def main() -> None:
        async with gateway_world(model, num_routers=2) as world, http_of(world) as http:
            older, newer = world.routers
            newer.adapters = [SQL]
            await until(world, "/v1/models/sql", 200)
            for _ in range(3):
                call = asyncio.ensure_future(
                    http.post("/v1/completions", json={"model": "sql", "prompt": "x"})
                )
                await say(newer, raw_tokenizer)
                assert (await call).status_code == 200
            assert not older.served

    run(main())


def test_an_answer_goes_on_at_a_router_that_has_it_with_what_began_it(
    model: Path, raw_tokenizer: Tokenizer
) -> None:
    async def main() -> None:
        async with (
            gateway_world(model, "bus.liveness=100000", num_routers=3, adapters=[SQL]) as world,
            http_of(world) as http,
        ):
            call = asyncio.ensure_future(http.post("/v1/completions", json={"model": "sql", "prompt": "x"}))
            first = await world.routers[0].request()
            world.routers[1].adapters = []
            await world.routers[1].next_beat()
            await world.routers[1].next_beat()
            first.send(raw_tokenizer.encode("ab").ids)
            first.end("error", code="draining", detail="the router stops", retry_after_s=1.0)
            moved = await say(world.routers[2], raw_tokenizer, "c")
            assert (moved.message.adapter, moved.message.adapter_revision) == ("sql", "r1")
            assert (await call).json()["choices"][0]["text"] == "abc"
            assert not world.routers[1].served

    run(main())
