"""Probes of structured output: OpenAI's ``response_format`` and vLLM's own fields."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from tests.gateway.probes.probe import SAYS, USER, Bench, probe

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}
ADA = '{"name": "Ada"}'


def kind(bench: Bench) -> str:
    grammar = bench.asked().message.sampling.grammar
    assert grammar is not None
    return grammar.kind


def json_schema(schema: Any = SCHEMA, **more: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, **more}}


@probe('`response_format={"type": "text"}`')
def text(bench: Bench) -> None:
    assert bench.chat(response_format={"type": "text"}).choices[0].message.content == SAYS
    assert bench.asked().message.sampling.grammar is None


@probe('`response_format={"type": "json_object"}`', says=ADA)
def json_object(bench: Bench) -> None:
    reply = bench.chat(response_format={"type": "json_object"})
    assert json.loads(reply.choices[0].message.content) == {"name": "Ada"} and kind(bench) == "json_object"


@probe("`json_schema`, `strict`", says=ADA)
def schema(bench: Bench) -> None:
    reply = bench.chat(response_format=json_schema(strict=True))
    assert json.loads(reply.choices[0].message.content) == {"name": "Ada"} and kind(bench) == "json_schema"


@probe("`.parse` with a pydantic model", says=ADA)
def parsed(bench: Bench) -> None:
    class Person(BaseModel):
        name: str

    reply = bench.client.chat.completions.parse(model="tiny", messages=USER, response_format=Person)
    assert reply.choices[0].message.parsed == Person(name="Ada")
    assert reply.choices[0].message.refusal is None


@probe("`json_schema` with `stream`", says=ADA)
def streamed(bench: Bench) -> None:
    chunks = bench.chat(response_format=json_schema(), stream=True)
    assert json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks)) == {"name": "Ada"}


@probe("a schema that cannot be enforced", refused=400, param="response_format")
def not_enforced(bench: Bench) -> None:
    bench.chat(response_format=json_schema({**SCHEMA, "not": {"type": "null"}}, strict=True))


@probe("`json_schema` without a schema", refused=400, param="response_format")
def nothing(bench: Bench) -> None:
    bench.chat(response_format={"type": "json_schema", "json_schema": {"name": "x"}})


@probe("`response_format` of another type", refused=400, param="response_format")
def other(bench: Bench) -> None:
    bench.chat(response_format={"type": "grammar", "grammar": "x"})


@probe("vLLM's `structured_outputs` and `guided_choice`", says="yes")
def of_vllm(bench: Bench) -> None:
    for field in ({"structured_outputs": {"choice": ["yes", "no"]}}, {"guided_choice": ["yes", "no"]}):
        assert bench.chat(extra_body=field).choices[0].message.content == "yes"
        assert kind(bench) == "choice"


@probe("two formats at a time", refused=400, param="guided_regex")
def two(bench: Bench) -> None:
    bench.chat(response_format={"type": "json_object"}, extra_body={"guided_regex": "a+"})
