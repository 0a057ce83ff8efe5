"""``/view`` of a gateway with a scripted router: what ran, taken apart; who may look; what changes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest

from microserve.gateway.route import view_routes
from tests.support.gateway.gateway_world import GatewayWorld, gateway_world, make_tokenizer, run


async def ended(http: httpx.AsyncClient, count: int, **choice: str) -> list[dict[str, Any]]:
    """So many requests, once their lines are there: an answer is whole a moment before its account."""
    while True:
        said = (await http.get("/view/requests", params=choice)).json()
        if len(said["ended"]) >= count:
            found: list[dict[str, Any]] = said["ended"]
            return found
        await asyncio.sleep(0)


async def ask(world: GatewayWorld, http: httpx.AsyncClient, num_tokens: int = 4, name: str = "") -> None:
    """One request, served."""
    body = {"model": "tiny", "prompt": "hello mesh", "max_tokens": num_tokens}
    answer = asyncio.create_task(
        http.post("/v1/completions", json=body, headers={"x-request-id": name} if name else {})
    )
    served = await world.router.request()
    served.send([7] * num_tokens)
    served.end()
    assert (await answer).status_code == 200


def test_a_request_is_remembered_and_its_phases_add_up(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, httpx.AsyncClient(base_url=world.address) as http:
            await ask(world, http, name="mine")
            [form] = await ended(http, 1)
            assert (form["http_id"], form["status"], form["output_tokens"]) == ("mine", 200, 4)
            assert sum(form["phases_s"].values()) == pytest.approx(form["wall_s"])
            detail = (await http.get("/view/requests/mine")).json()
            assert detail["request"]["id"] == form["id"] and detail["records"] == []
            assert sum(part["seconds"] for part in detail["timeline"]) == pytest.approx(form["wall_s"])
            assert detail["silent"] == ["index"], "nobody is there who could be asked why"
            missing = await http.get("/view/requests/nobody")
            assert (missing.status_code, missing.json()["error"]["param"]) == (404, "request_id")

    run(main())


def test_refused_requests_are_remembered_too(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, httpx.AsyncClient(base_url=world.address) as http:
            wrong = await http.post("/v1/completions", json={"prompt": "x", "temperature": -1})
            assert wrong.status_code == 400
            await ask(world, http)
            await ended(http, 2)
            [form] = await ended(http, 1, code="any")
            assert (form["status"], form["code"], form["engines"]) == (400, "invalid_request", [])
            wrong = await http.get("/view/requests?limit=0")
            assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "limit")

    run(main())


def test_what_is_wrong_is_said(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, httpx.AsyncClient(base_url=world.address) as http:
            health = (await http.get("/view/health")).json()
            assert health["ready"] and [each["name"] for each in health["alarms"]] == ["index.silent"]
            mesh = (await http.get("/view/mesh")).json()
            assert (mesh["index_alive"], mesh["engines"], mesh["pairs"]) == (False, [], [])
            assert [each["alive"] for each in mesh["routers"]] == [True]
            silent = await http.get("/view/strategies")
            assert silent.status_code == 504 and "index" in silent.json()["error"]["message"]

    run(main())


async def messages(
    http: httpx.AsyncClient, **headers: str
) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
    """Ids and bodies of the feed's events."""
    name = ""
    async with http.stream("GET", "/view/feed", headers=headers, timeout=60.0) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        async for line in answer.aiter_lines():
            if line.startswith("id: "):
                name = line.removeprefix("id: ")
            elif line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: "))


def test_the_feed_tells_what_changes_and_goes_on_where_it_was(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_routes, "FEED_INTERVAL_S", 0.2)

    async def main() -> None:
        async with gateway_world(model) as world, httpx.AsyncClient(base_url=world.address) as http:
            await ask(world, http)
            await ended(http, 1)
            feed, other = messages(http), messages(http)
            name, first = await anext(feed)
            assert first["type"] == "snapshot" and len(first["ended"]) == 1
            await anext(other)  # it keeps the feed going while the first one is away
            await ask(world, http)
            told: list[dict[str, Any]] = []
            while not told:
                name, message = await anext(feed)
                assert message["type"] == "delta"
                told += message.get("ended", [])
            await feed.aclose()
            await ask(world, http, 2)
            back = messages(http, **{"last-event-id": name})
            later: list[dict[str, Any]] = []
            while not later:
                _, message = await anext(back)
                assert message["type"] == "delta", "it was not away for long"
                later += message.get("ended", [])
            assert len(told) == len(later) == 1 and later[0]["output_tokens"] == 2
            await back.aclose()
            await other.aclose()

    run(main())


def test_only_operators_look_where_there_are_keys(model: Path, tmp_path: Path) -> None:
    paths = ("mesh", "requests", "requests/x", "strategies", "keys", "health", "feed")

    async def main() -> None:
        keys = f"gateway.api_keys_file={keys_file(tmp_path)}"
        async with gateway_world(model, keys) as world, httpx.AsyncClient(base_url=world.address) as http:
            for path in paths:
                assert (await http.get(f"/view/{path}")).status_code == 401, path
                plain = await http.get(f"/view/{path}", headers={"authorization": "Bearer plain"})
                assert plain.status_code == 403, path
            operator = {"authorization": "Bearer operator"}
            said = (await http.get("/view/keys", headers=operator)).json()["keys"]
            assert [(each["name"], each["operator"]) for each in said] == [("ops", True), ("user", False)]

    run(main())


def keys_file(directory: Path) -> Path:
    path = directory / "keys.toml"
    path.write_text(
        f'[keys.ops]\nsha256 = ["{hashlib.sha256(b"operator").hexdigest()}"]\noperator = true\n'
        f'[keys.user]\nsha256 = ["{hashlib.sha256(b"plain").hexdigest()}"]\n'
    )
    return path


@pytest.mark.slow
def test_a_request_counts_from_when_its_connection_was_let_in_with_it(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy loop takes some turns until it reads what has come; the client waits from before them."""
    monkeypatch.setattr("microserve.gateway.http.accept.monotonic", lambda: time.monotonic() - 100.0)
    body = b'{"model":"other","prompt":"x"}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: t\r\nx-request-id: %b\r\ncontent-length: %d\r\n\r\n"

    async def main() -> None:
        async with gateway_world(model) as world, httpx.AsyncClient(base_url=world.address) as http:
            with socket.create_connection(("127.0.0.1", world.port)) as client:
                client.sendall(head % (b"first", len(body)) + body)  # before the loop can look
                [first] = await ended(http, 1)
                client.sendall(head % (b"second", len(body)) + body)
                [second, _] = await ended(http, 2)
            assert (first["http_id"], second["http_id"]) == ("first", "second")
            assert first["phases_s"]["queued"] >= 100.0 > second["phases_s"]["queued"]

    run(main())


@pytest.mark.slow
def test_a_stream_takes_until_its_last_byte(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its usage comes behind the end of its text, when the router has said what it was."""
    monkeypatch.setattr("microserve.gateway.generation.group.SETTLE_S", 30.0)
    options = {"stream": True, "stream_options": {"include_usage": True}, "stop": ["b"]}
    body = {"model": "tiny", "prompt": "x", "max_tokens": 9, **options}

    async def main() -> None:
        async with (
            gateway_world(model, confirm_cancels=False) as world,
            httpx.AsyncClient(base_url=world.address) as http,
        ):
            answer = asyncio.create_task(http.post("/v1/completions", json=body))
            served = await world.router.request()
            served.send(make_tokenizer().encode("ab").ids)
            await served.cancelled.wait()
            [running] = (await http.get("/view/requests")).json()["running"]
            served.end("abort")
            assert (await answer).text.endswith("[DONE]\n\n")
            [form] = await ended(http, 1)
            assert form["finish_reason"] == "stop"
            assert form["wall_s"] >= running["age_s"]

    run(main())
