"""What a client is told of its answer's numerics class: in the head, in a stream's last chunks, in a line."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from tokenizers import Tokenizer

from microserve.gateway.http import sse
from microserve.gateway.keys.key import ApiKey, digest_of, entry_of
from microserve.protocol import log
from microserve.protocol.messages.numerics import MIXED, UNKNOWN, Numerics
from microserve.protocol.messages.router import Served as ServedBy
from tests.support.gateway.gateway_world import Connection, GatewayWorld, Served, gateway_world, post, run

A, B, LOOSE = Numerics("a", is_exact=True), Numerics("b", is_exact=True), Numerics("loose")
BOTH = Numerics(MIXED)
EXACT = "x-microserve-exact"


async def whole(world: GatewayWorld, **body: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=world.address, timeout=20.0) as http:
        return await http.post("/v1/completions", json={"model": "tiny", "prompt": "x", **body})


@asynccontextmanager
async def stream(world: GatewayWorld, **body: Any) -> AsyncIterator[Connection]:
    async with post(world, "/v1/completions", prompt="x", stream=True, **body) as client:
        yield client


async def last_words(client: Connection) -> dict[int, str]:
    """What the last chunk of each choice says; no other chunk says anything."""
    chunks = [event for event in await client.events() if event != "[DONE]"]
    told = [(chunk["choices"][0], chunk.get("microserve")) for chunk in chunks]
    assert all((choice["finish_reason"] is None) == (words is None) for choice, words in told)
    return {choice["index"]: words["exact"] for choice, words in told if words is not None}


@pytest.mark.parametrize(
    ("numerics", "told"), [(A, "a"), (LOOSE, "none"), (BOTH, "none"), (UNKNOWN, "none"), (None, "none")]
)
def test_an_answer_that_comes_as_a_whole(
    model: Path, raw_tokenizer: Tokenizer, numerics: Numerics | None, told: str
) -> None:
    async def main() -> None:
        def answer(served: Served) -> None:
            served.send(raw_tokenizer.encode("a").ids, numerics=numerics)
            served.end("length", numerics=numerics or UNKNOWN)

        async with gateway_world(model) as world:
            world.router.answer = answer
            with structlog.testing.capture_logs() as logs:
                reply = await whole(world)
        assert reply.headers["x-microserve-exact"] == told
        [line] = [entry for entry in logs if entry["event"] == log.REQUEST_FINISHED]
        known = numerics or UNKNOWN
        assert (line["numerics"], line["exact"]) == (known.name, known.is_exact)

    run(main())


@pytest.mark.parametrize(
    ("first", "later", "ended", "told"),
    [
        (A, None, A, "a"),
        (A, BOTH, BOTH, "none"),
        (A, None, BOTH, "none"),
        (LOOSE, None, LOOSE, "none"),
        (None, None, UNKNOWN, "none"),
    ],
)
def test_a_stream_says_first_how_it_begins_and_last_what_it_was(
    model: Path,
    raw_tokenizer: Tokenizer,
    first: Numerics | None,
    later: Numerics | None,
    ended: Numerics,
    told: str,
) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, stream(world) as client:
            served = await world.router.request()
            served.send(raw_tokenizer.encode("a").ids, numerics=first)
            _, headers = await client.head()
            assert headers["x-microserve-exact"] == (first or UNKNOWN).promise
            served.send(raw_tokenizer.encode("b").ids, numerics=later)
            served.end("length", numerics=ended)
            assert await last_words(client) == {0: told}

    run(main())


def test_the_client_says_whether_its_kv_may_lose_else_its_key(
    model: Path, raw_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """By every API."""
    talk = {"messages": [{"role": "user", "content": "x"}]}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "x"},
        "/v1/chat/completions": talk,
        "/v1/responses": {"input": "x"},
        "/v1/messages": {**talk, "max_tokens": 4},
    }
    keys = tmp_path / "keys.toml"
    named = [
        ApiKey(name=name, sha256=(digest_of(name),), lossy=name == "lossy") for name in ("lossy", "other")
    ]
    keys.write_text("".join(map(entry_of, named)))
    cases = [
        ("other", "true", True),
        ("lossy", "true", True),
        ("other", "false", False),
        ("lossy", None, False),
        ("other", None, None),
    ]

    async def main() -> None:
        asked: list[bool | None] = []

        def answer(served: Served) -> None:
            asked.append(served.message.exact)
            served.send(raw_tokenizer.encode("a").ids)
            served.end("length")

        async with gateway_world(model, f"gateway.api_keys_file={keys}") as world:
            world.router.answer = answer
            async with httpx.AsyncClient(base_url=world.address, timeout=20.0) as http:
                for path, body in bodies.items():
                    for key, header, _ in cases:
                        headers = {"authorization": f"Bearer {key}"} | ({EXACT: header} if header else {})
                        reply = await http.post(path, json={"model": "tiny", **body}, headers=headers)
                        assert reply.status_code == 200, reply.text
        assert asked == [expected for _, _, expected in cases] * len(bodies)

    run(main())


def test_what_is_neither_true_nor_false_is_refused(model: Path) -> None:
    async def main() -> None:
        async with (
            gateway_world(model) as world,
            httpx.AsyncClient(base_url=world.address, headers={EXACT: "yes"}) as http,
        ):
            reply = await http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == EXACT

    run(main())


def test_the_line_says_through_what_kv_went(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        def answer(served: Served) -> None:
            served.send(raw_tokenizer.encode("a").ids, numerics=A)
            served.end("length", numerics=A, heaps=["shm", "tcp"])

        async with gateway_world(model) as world:
            world.router.answer = answer
            with structlog.testing.capture_logs() as logs:
                assert (await whole(world)).status_code == 200
        [line] = [entry for entry in logs if entry["event"] == log.REQUEST_FINISHED]
        assert line["heaps"] == ["shm", "tcp"]

    run(main())


def test_a_stream_says_first_what_serves_it(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, stream(world) as client:
            served = await world.router.request()
            by = ServedBy("mine", 7, ["e0"])
            served.send(raw_tokenizer.encode("a").ids, numerics=A, served=by)
            _, headers = await client.head()
            assert headers["x-microserve-strategy"] == "mine"
            assert headers["x-microserve-strategy-version"] == "7"
            assert headers["x-microserve-engines"] == "e0"
            served.end("length", numerics=A)
            await rest(client)

    run(main())


def test_a_stream_that_a_stop_string_ends_is_of_the_class_so_far(
    model: Path, raw_tokenizer: Tokenizer
) -> None:
    """The gateway ends it: nobody has said what the whole is."""

    async def main() -> None:
        async with gateway_world(model) as world, stream(world, stop=["b"]) as client:
            served = await world.router.request()
            served.send(raw_tokenizer.encode("a").ids, numerics=A)
            served.send(raw_tokenizer.encode("b").ids)
            await client.head()
            assert await last_words(client) == {0: "a"}

    run(main())


def test_each_choice_is_of_its_own_class_and_the_head_of_all(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model) as world:
            async with stream(world, n=2) as client:
                one, two = [await world.router.request(), await world.router.request()]
                for served, numerics in ((one, A), (two, B)):
                    served.send(raw_tokenizer.encode("a").ids, numerics=numerics)
                    served.end("length", numerics=numerics)
                await client.head()
                assert await last_words(client) == {0: "a", 1: "b"}

            classes = iter([A, B, A, A])

            def answer(served: Served) -> None:
                served.send(raw_tokenizer.encode("a").ids)
                served.end("length", numerics=next(classes))

            world.router.answer = answer
            assert (await whole(world, n=2)).headers["x-microserve-exact"] == "none"
            assert (await whole(world, n=2)).headers["x-microserve-exact"] == "a"

    run(main())


def test_a_head_that_must_go_before_there_is_output_says_nothing(
    model: Path, raw_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setattr(sse, "PING_S", 0.02)
        async with gateway_world(model) as world, stream(world) as client:
            served = await world.router.request()
            _, headers = await client.head()
            assert "x-microserve-exact" not in headers
            served.send(raw_tokenizer.encode("a").ids, numerics=A)
            served.end("length", numerics=A)
            assert b'"microserve":{"exact":"a"}' in await rest(client)

    run(main())


async def rest(client: Connection) -> bytes:
    """All that comes, pings too."""
    data = b""
    while part := await client.chunk():
        data += part
    return data


@pytest.mark.parametrize("says", [True, False], ids=["the next router says", "it is of before"])
def test_the_next_router_is_told_and_what_it_says_counts(
    model: Path, raw_tokenizer: Tokenizer, says: bool
) -> None:
    async def main() -> None:
        async with gateway_world(model, num_routers=2) as world, stream(world) as client:
            first, second = world.routers
            served = await _either(world)
            other = second if served.router is first else first
            served.send(raw_tokenizer.encode("a").ids, numerics=A)
            await client.head()
            served.router.forget()
            again = await other.request()
            assert again.message.num_output_tokens and again.message.numerics == A
            again.sent = again.message.num_output_tokens
            again.send(raw_tokenizer.encode("b").ids, numerics=A if says else None)
            again.end("length", numerics=A if says else UNKNOWN)
            assert await last_words(client) == {0: "a" if says else "none"}

    run(main())


async def _either(world: GatewayWorld) -> Served:
    while True:
        for router in world.routers:
            if router.served:
                return await router.request()
        await world.router.next_beat()


def test_the_document_names_it(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, httpx.AsyncClient(base_url=world.address) as http:
            paths = json.loads((await http.get("/openapi.json")).content)["paths"]
            for path in ("/v1/chat/completions", "/v1/completions"):
                assert "x-microserve-exact" in paths[path]["post"]["responses"]["200"]["headers"]

    run(main())
