"""Over HTTP, with a real helper: a grammar goes out with each choice, a bad one is a 400, a bomb too."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from microserve.protocol.messages.request.sampling import Grammar
from tests.support.gateway.gateway_world import GatewayWorld, Served, gateway_world, make_tokenizer, run

pytestmark = pytest.mark.slow

SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "format": "colour"}}}
BOMB = {
    "allOf": [
        {
            "type": "object",
            "properties": {f"k{i}": {"pattern": f"a{i}"}, "x": {"type": "string", "pattern": f"^.*a{i}.*$"}},
        }
        for i in range(30)
    ]
}
"""Takes minutes to be told that it is none."""


def answer(served: Served) -> None:
    served.send([65])
    served.end("stop")


async def ask(world: GatewayWorld, **fields: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{world.port}", timeout=60.0) as client:
        return await client.post("/v1/completions", json={"model": "tiny", "prompt": "x", **fields})


def test_a_grammar_reaches_the_router_and_a_warning_the_client(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model) as world:
            world.router.answer = answer
            wish = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
            for stream in (False, True):
                reply = await ask(world, response_format=wish, n=2, stream=stream)
                assert reply.status_code == 200, reply.text
                assert reply.headers["x-microserve-warning"] == (
                    "format 'colour' at #/properties/a is not enforced"
                )
            sent = {json.dumps(json.loads(each.message.sampling.grammar.text)) for each in served(world)}
            assert sent == {'{"type": "object", "properties": {"a": {"type": "string"}}}'}
            assert len(world.router.served) == 4

            wish["json_schema"]["strict"] = True  # type: ignore[index]
            reply = await ask(world, response_format=wish)
            assert reply.status_code == 400
            assert reply.json()["error"]["param"] == "response_format"
            assert "format at #/properties/a" in reply.json()["error"]["message"]

            reply = await ask(world, guided_choice=["a", "b"])
            assert reply.status_code == 200 and "x-microserve-warning" not in reply.headers
            last = list(world.router.served.values())[-1].message.sampling.grammar
            assert last == Grammar(kind="choice", text='["a","b"]')

    run(main())


def test_a_stop_string_cuts_a_schemas_answer_too(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model) as world:

            def say(served: Served) -> None:
                served.send(make_tokenizer().encode('{"a": {"b": 1}}').ids)
                served.end("stop")

            world.router.answer = say
            reply = await ask(world, guided_json={"type": "object"}, stop="}", max_tokens=64)
            [choice] = reply.json()["choices"]
            assert (choice["text"], choice["finish_reason"]) == ('{"a": {"b": 1', "stop")

    run(main())


def served(world: GatewayWorld) -> list[Any]:
    return list(world.router.served.values())


def test_a_bomb_is_a_400_and_the_next_one_is_served(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model) as world:
            world.router.answer = answer
            bomb, free = await asyncio.gather(
                ask(world, structured_outputs={"json": BOMB}), ask(world, max_tokens=1)
            )
            assert free.status_code == 200
            assert bomb.status_code == 400 and "more time or memory" in bomb.text
            large = {"enum": ["x" * 1000 for _ in range(10_000)]}
            for wish in (large, {"enum": [str(i) for i in range(100_000)]}):
                reply = await ask(world, structured_outputs={"json": wish})
                assert (
                    reply.status_code == 400 and reply.json()["error"]["param"] == "structured_outputs.json"
                )
            reply = await ask(world, structured_outputs={"regex": "[ab]+"})
            assert reply.status_code == 200, reply.text
            assert len(world.router.served) == 2

    run(main())
