"""A body of any kind and the full size: its client is answered, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from microserve.gateway.helper.helper import INLINE_BODY_NBYTES
from tests.support.gateway.gateway_world import GatewayWorld, Served, connect, gateway_world, run

pytestmark = pytest.mark.slow  # a gateway with its helpers, each time

FULL = 31 << 20
LONGEST_STAND_S = 0.75
"""Of work: half the silence after which a router gives a gateway up, by default. Measured: 0.01 to 0.03 s."""


def completion(members: bytes) -> bytes:
    return b'{"model":"tiny",' + members + b"}"


KINDS: dict[str, tuple[Callable[[], bytes], str | None]] = {
    # What is sent, and the field that a refusal names; None: it is served.
    "nested lists": (lambda: completion(b'"prompt":[' + b"[]," * (FULL // 3) + b"[]]"), "prompt"),
    "deep lists": (lambda: completion(b'"prompt":' + b"[" * (FULL // 2) + b"]" * (FULL // 2)), "prompt"),
    "ids": (lambda: completion(b'"prompt":[' + b"1," * (FULL // 2) + b"1]"), "prompt"),
    "as many ids as may be": (lambda: completion(b'"prompt":[' + b"1," * 1_048_000 + b"1]"), "prompt"),
    "texts": (lambda: completion(b'"prompt":[' + b'"",' * (FULL // 3) + b'""]'), "prompt"),
    "one text": (lambda: completion(b'"prompt":"' + b"x " * (FULL // 2) + b'"'), "prompt"),
    "escapes": (lambda: completion(b'"prompt":"' + b"\\u00e9" * (FULL // 6) + b'"'), "prompt"),
    "unknown keys": (
        lambda: completion(
            b'"prompt":"x",' + b",".join(b'"%07d":%d' % (i, i % 10) for i in range(2_000_000))
        ),
        "any",
    ),
    "messages": (
        lambda: completion(b'"messages":[' + b'{"role":"user","content":"x"},' * (FULL // 30) + b"{}]"),
        "messages",
    ),
    "one message": (
        lambda: completion(b'"messages":[{"role":"user","content":"' + b"x " * (FULL // 2) + b'"}]'),
        "messages",
    ),
    "metadata": (lambda: completion(b'"prompt":"x","metadata":"' + b"x" * FULL + b'"'), None),
    "a number": (lambda: completion(b'"prompt":"x","seed":' + b"9" * FULL), "seed"),
    "blanks": (lambda: completion(b'"prompt":"x"') + b" " * FULL, None),
    "no JSON": (lambda: b"\xff" * FULL, "any"),
}


async def send(world: GatewayWorld, body: bytes) -> tuple[int, bytes]:
    path = "chat/completions" if body.startswith(b'{"model":"tiny","messages"') else "completions"
    async with connect(world) as client:
        head = f"POST /v1/{path} HTTP/1.1\r\nhost: t\r\ncontent-length: {len(body)}\r\n\r\n"
        await client.send(head.encode())
        for begin in range(0, len(body), 1 << 17):
            await client.send(body[begin : begin + (1 << 17)])
        status, headers = await client.head()
        return status, await client.reader.readexactly(int(headers["content-length"]))


MANY = b",".join(
    b'{"type":"function","function":{"name":"f%d","x":[%s]}}' % (i, b"1," * 8000 + b"1") for i in range(100)
)
CHAT = b'{"model":"tiny","messages":[{"role":"user","content":"x"}],'
NO_FORMAT = b'"prompt":"x","response_format":{"type":"text","structures":['
KINDS |= {
    "tools that are off": (lambda: CHAT + b'"tool_choice":"none","tools":[' + MANY + b"]}", None),
    "a format that is none": (lambda: completion(NO_FORMAT + b"1," * 1_000_000 + b"1]}"), None),
}

DEAREST = (
    "tools that are off",
    "nested lists",
    "ids",
    "unknown keys",
    "messages",
    "metadata",
    "blanks",
    "no JSON",
)
"""What takes the longest of each thing that can be wrong, and what is served; the others: heavy lane."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [kind if kind in DEAREST else pytest.param(kind, marks=pytest.mark.heavy) for kind in KINDS]
)
def test_a_body_of_31_mb_holds_nobody_up(model: Path, kind: str) -> None:
    make, field = KINDS[kind]
    body = make()

    async def main() -> None:
        async with gateway_world(model) as world:
            world.router.answer = lambda served: served.end("length")
            longest_s, begun = 0.0, asyncio.Event()

            async def turn() -> None:
                nonlocal longest_s
                last = time.process_time()  # not the wall's: others use this machine, too
                while True:
                    begun.set()
                    await asyncio.sleep(0.001)
                    now = time.process_time()
                    longest_s, last = max(longest_s, now - last), now

            turning = asyncio.create_task(turn())
            await begun.wait()
            status, content = await send(world, body)
            turning.cancel()
            if field is None:
                assert status == 200
            else:
                error = json.loads(content)["error"]
                assert status == 400
                assert field == "any" or error["param"].split("[")[0] == field
            assert longest_s < LONGEST_STAND_S

    run(main(), timeout_s=120.0)


ATTRIBUTES = ('gateway.attributes=["metadata.kind","user"]', "gateway.private_attributes=[]")


def test_a_large_body_is_what_a_small_one_is(model: Path, raw_tokenizer: Tokenizer) -> None:
    """The same request, with and without what makes it large, comes to the same at the router."""
    padding: dict[str, object] = {"padding": "x" * INLINE_BODY_NBYTES}
    fields: dict[str, object] = {
        "model": "tiny", "max_tokens": 9, "temperature": 0.5, "logit_bias": {"3": 1.5}, "stop_token_ids": [5],
        "stop": ["xyz"], "n": 2, "seed": 7, "user": "u", "cache_salt": "s", "logprobs": 1, "unknown": [1],
        "metadata": {"kind": "a"},
    }  # fmt: skip
    prompts: dict[str, dict[str, object]] = {
        "/v1/completions": {"prompt": ["Hello world", "fox"]},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "logprobs": True},
    }

    async def main() -> None:
        async with (
            gateway_world(model, *ATTRIBUTES) as world,
            httpx.AsyncClient(base_url=world.address, timeout=20.0) as http,
        ):
            world.router.answer = lambda served: served.end("length")
            for path, prompt in prompts.items():
                asked: list[list[Served]] = []
                for more in (dict[str, object](), padding):
                    world.router.served.clear()
                    reply = await http.post(path, json=fields | prompt | more)
                    assert reply.status_code == 200, reply.text
                    asked.append(list(world.router.served.values()))
                small, large = asked
                assert [each.tokens for each in large] == [each.tokens for each in small] != []
                assert [each.message.sampling for each in large] == [each.message.sampling for each in small]
                assert all(
                    each.message.attributes == {"metadata.kind": "a", "user": "u"} for each in small + large
                )
                assert {each.message.salt for each in small + large} == {"s"}
            others: list[tuple[str, dict[str, object]]] = [
                ("/tokenize", {"prompt": "Hello world"}),
                ("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}),
                ("/detokenize", {"tokens": raw_tokenizer.encode("Hello world").ids}),
            ]
            for path, body in others:
                replies = [await http.post(path, json=body | more) for more in ({}, padding)]
                assert [reply.status_code for reply in replies] == [200, 200]
                assert replies[0].json() == replies[1].json()

    run(main())


@pytest.mark.parametrize(
    ("path", "fields", "status", "param"),
    [
        ("/v1/completions", {"prompt": "x", "top_k": 1 << 64}, 400, "top_k"),
        ("/v1/completions", {"prompt": "x", "model": "other"}, 404, "model"),
        ("/v1/completions", {"prompt": "x" * 100_000}, 400, "prompt"),
        ("/v1/completions", {"prompt": [400]}, 400, "prompt"),
        ("/v1/completions", {"prompt": "x", "n": 17}, 400, "n"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": None}]},
            400,
            "messages[0].content",
        ),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 100_000}]}, 400, "messages"),
        ("/detokenize", {"tokens": [999]}, 400, "tokens"),
        ("/tokenize", {}, 400, "prompt"),
    ],
)
def test_what_is_wrong_in_a_large_body_is_named(
    model: Path, path: str, fields: dict[str, object], status: int, param: str
) -> None:
    async def main() -> None:
        async with (
            gateway_world(model, vocab_size=300) as world,
            httpx.AsyncClient(base_url=world.address, timeout=20.0) as http,
        ):
            body = {"model": "tiny", "metadata": "x" * INLINE_BODY_NBYTES} | fields
            reply = await http.post(path, json=body)
            assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)
            assert world.router.served == {}

    run(main())


def test_a_client_that_goes_while_its_body_waits_is_not_worked_for(model: Path) -> None:
    body = json.dumps({"model": "tiny", "prompt": "x", "metadata": "x" * INLINE_BODY_NBYTES}).encode()

    async def main() -> None:
        async with gateway_world(model) as world:
            world.router.answer = lambda served: served.end("length")
            head = b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: %d\r\n\r\n" % len(body)
            async with connect(world) as first, connect(world) as gone, connect(world) as last:
                for client in (first, gone, last):
                    await client.send(head + body)
                gone.reset()
                assert (await first.head())[0] == (await last.head())[0] == 200
            assert len(world.router.served) == 2

    run(main())
