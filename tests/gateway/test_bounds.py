"""Both bounds of every field, on every path, whatever the routers do: served, or a 400 that names the field.

The fields and their bounds come from the schema itself, so a new field is tried here from its first day.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from microserve.gateway.openai.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from microserve.gateway.responses.schema import ResponsesRequest
from microserve.protocol.messages.request.prompt_logprobs import FIRST_POSITION, PromptLogprob, packed
from tests.support.gateway.gateway_world import (
    Connection,
    GatewayWorld,
    ScriptedRouter,
    Served,
    connect,
    gateway_world,
    run,
)

MESSAGES = '[{"role":"user","content":"x"}]'
PATHS: dict[str, tuple[type[msgspec.Struct], dict[str, str]]] = {
    "/v1/chat/completions": (ChatRequest, {"model": '"tiny"', "messages": MESSAGES}),
    "/v1/completions": (CompletionRequest, {"model": '"tiny"', "prompt": '"x"'}),
    "/v1/responses": (ResponsesRequest, {"model": '"tiny"', "input": '"x"'}),
    "/tokenize": (TokenizeRequest, {"prompt": '"x"'}),
    "/detokenize": (DetokenizeRequest, {"tokens": "[1]"}),
}
NUMBERS = (
    *("0", "-0", "-1", "1", "5e-324", "1e308", "-1e308", "1e400", "NaN", "Infinity", "-Infinity", "1.5"),
    *(
        str(sign * (1 << bits) + step)
        for bits in (31, 32, 53, 63, 64)
        for sign in (1, -1)
        for step in (-1, 0)
    ),
    *("9" * 5000, "-" + "9" * 5000),
)
OTHERS = ("null", "true", "false", '""', '"x"', "[]", "{}", "[[]]", "[{}]", '["x"]', "[true]", '{"x":{}}')


def bounds_of(schema: Any) -> Iterator[float]:
    """Every number that a schema names as a bound of values."""
    if isinstance(schema, list):
        for each in schema:
            yield from bounds_of(each)
    elif isinstance(schema, dict):
        for name, value in schema.items():
            if name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
                yield value
            yield from bounds_of(value)


def values_of(schema: Any) -> Iterator[str]:
    """What to try for a field: by itself, in a list, and as key and value of a map."""
    numbers = list(NUMBERS)
    for bound in bounds_of(schema):
        numbers += [json.dumps(bound + step) for step in (-1, 0, 1)]
    yield from dict.fromkeys(numbers)
    yield from OTHERS
    text = json.dumps(schema)
    if '"array"' in text:
        yield from (f"[{number}]" for number in numbers)
        for longest in lengths_of(schema, "maxItems"):
            if longest <= 1024:
                yield from (json.dumps(["x"] * n) for n in (longest, longest + 1))
                yield from (json.dumps([1] * n) for n in (longest, longest + 1))
    if '"object"' in text:
        yield from (f'{{"{number}":1}}' for number in numbers)
        yield from (f'{{"1":{number}}}' for number in numbers)
        for most in lengths_of(schema, "maxProperties"):
            yield from (json.dumps(dict.fromkeys(map(str, range(n)), 1)) for n in (most, most + 1))
    for longest in lengths_of(schema, "maxLength"):
        yield from (json.dumps("x" * n) for n in (longest, longest + 1))
        yield from (json.dumps(["x" * n]) for n in (longest, longest + 1))


def lengths_of(schema: Any, name: str) -> Iterator[int]:
    if isinstance(schema, list):
        for each in schema:
            yield from lengths_of(each, name)
    elif isinstance(schema, dict):
        if isinstance(schema.get(name), int):
            yield schema[name]
        for value in schema.values():
            yield from lengths_of(value, name)


def cases() -> Iterator[tuple[str, str, bytes]]:
    """Path, field, body."""
    kinds = [kind for kind, _ in PATHS.values()]
    _, schemas = msgspec.json.schema_components(kinds)
    for path, (kind, base) in PATHS.items():
        for name, schema in schemas[kind.__name__]["properties"].items():
            is_open = not {"anyOf", "type", "$ref"} & schema.keys()  # whatever it is, it is not looked at
            for value in ("null", "1", '"x"', "[]", "NaN", "9" * 5000) if is_open else values_of(schema):
                fields = {**base, name: value}
                members = ",".join(f'"{key}":{given}' for key, given in fields.items())
                yield path, name, f"{{{members}}}".encode()


async def post(client: Connection, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
    head = f"POST {path} HTTP/1.1\r\nhost: t\r\ncontent-length: {len(body)}\r\n\r\n"
    await client.send(head.encode() + body)
    status, headers = await client.head()
    if "content-length" in headers:
        return status, headers, await client.reader.readexactly(int(headers["content-length"]))
    content = b""
    while chunk := await client.chunk():
        content += chunk
    return status, headers, content


def fault_of(field: str, status: int, headers: dict[str, str], content: bytes, *, away: bool) -> str | None:
    """Why an answer is none that may be given to a request whose ``field`` is odd."""
    if status == 200:
        return None if b'"error":{' not in content else "an error as an answer"
    error = json.loads(content)["error"]
    if away and status == 503 and "retry-after" in headers:
        return None
    if status not in (400, 404) or (status == 404 and field != "model"):
        return f"{status} {error}"
    named = error["param"] or ""
    return None if named.split("[")[0].split(".")[0] == field else f"names {named!r}: {error['message'][:99]}"


def answer(served: Served) -> None:
    """No token, and the prompt's own where these are asked for."""
    num_top = served.message.sampling.prompt_logprobs
    if num_top is not None:
        row = PromptLogprob(-0.5, 1, ((0, -0.5),) * num_top)
        served.send(prompt=packed(FIRST_POSITION, num_top, [row] * (len(served.tokens) - FIRST_POSITION)))
    served.end("length")


async def try_all(world: GatewayWorld, *, away: bool) -> list[str]:
    """Every case, one after the other, on one connection; what was wrong."""
    faults: list[str] = []
    async with connect(world) as client:
        for path, field, body in cases():
            status, headers, content = await post(client, path, body)
            if fault := fault_of(field, status, headers, content, away=away):
                faults.append(f"{path} {field} {body[:120]!r}: {fault}")
    return faults


@pytest.mark.slow
def test_with_a_router(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model) as world:
            world.router.answer = answer
            assert await try_all(world, away=False) == []
            for served in world.router.served.values():  # nothing goes out that an engine could not take
                served.message.sampling.validate(world.router.vocab_size)

    run(main(), timeout_s=240.0)


@pytest.mark.slow
def test_without_any_router(model: Path) -> None:
    async def main() -> None:
        nobody = 'gateway.routers=["tcp://127.0.0.1:1"]'
        async with gateway_world(model, nobody, num_routers=0, wait_ready=False) as world:
            assert await try_all(world, away=True) == []

    run(main(), timeout_s=240.0)


@pytest.mark.slow
def test_while_the_router_restarts(model: Path) -> None:
    """Requests wait for its next life; what one of them has in it is no matter for the others."""

    async def main() -> None:
        async with gateway_world(model) as world:
            first = world.router
            address = first.address
            first.answer = answer
            numbers = [each for each in cases() if each[0].startswith("/v1/")]
            numbers = [
                each
                for each in numbers
                if len(each[2]) < 6000 and (each[1] == "top_k" or len(each[2]) % 7 == 0)
            ]
            async with connect(world) as client:  # the limits are known by now
                assert (await post(client, "/v1/completions", b'{"model":"tiny","prompt":"x"}'))[0] == 200
            await first.close()

            async def one(path: str, field: str, body: bytes) -> str | None:
                async with connect(world) as client:
                    status, headers, content = await post(client, path, body)
                fault = fault_of(field, status, headers, content, away=False)
                return fault and f"{path} {body[:120]!r}: {fault}"

            tasks = [asyncio.create_task(one(*each)) for each in numbers]
            while sum(task.done() for task in tasks) < len(tasks) // 4:
                await asyncio.sleep(0.02)
            second = ScriptedRouter(world.bus, address=address)
            world.routers[0] = second
            second.answer = answer
            assert [fault for fault in await asyncio.gather(*tasks) if fault] == []
            assert second.served  # some did wait, and were served

    run(main(), timeout_s=240.0)
