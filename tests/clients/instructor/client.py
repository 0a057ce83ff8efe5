"""``instructor``: its modes for servers that speak as OpenAI does."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal

import instructor
import openai
from checks import MESH, MESH_MODEL, TALKER, TALKER_MODEL, call_text, check, main
from pydantic import BaseModel

USER: list[Any] = [{"role": "user", "content": "hi"}]


ADA = {"name": "Ada", "kind": "adult"}


class Person(BaseModel):
    name: str
    kind: Literal["child", "adult"]


def on(base: str, mode: instructor.Mode) -> instructor.Instructor:
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
    return instructor.from_openai(client, mode=mode)


def try_mode(mode: instructor.Mode) -> None:
    """Retries are for answers without sense; here the first one fits."""
    client = on(MESH, mode)
    asked: Any = dict(model=MESH_MODEL, messages=USER, max_retries=0)
    person, raw = client.chat.completions.create_with_completion(response_model=Person, **asked)
    assert isinstance(person, Person) and raw.usage.completion_tokens > 0
    *_, last = client.chat.completions.create_partial(response_model=Person, **asked)
    assert Person.model_validate(last.model_dump())


@check("TOOLS")
def tools() -> None:
    try_mode(instructor.Mode.TOOLS)


@check("TOOLS_STRICT")
def tools_strict() -> None:
    try_mode(instructor.Mode.TOOLS_STRICT)


@check("JSON_SCHEMA")
def json_schema() -> None:
    try_mode(instructor.Mode.JSON_SCHEMA)


@check("JSON")
def json_object() -> None:
    said: Any = [{"role": "user", "content": f"say: {json.dumps(ADA)}"}]
    client = on(TALKER, instructor.Mode.JSON)
    person = client.chat.completions.create(
        model=TALKER_MODEL, messages=said, response_model=Person, max_retries=0
    )
    assert person.model_dump() == ADA


@check("RESPONSES_TOOLS")
def responses() -> None:
    client = on(MESH, instructor.Mode.RESPONSES_TOOLS)
    person = client.responses.create(model=MESH_MODEL, input="hi", response_model=Person, max_retries=0)
    assert isinstance(person, Person)


@check("PARALLEL_TOOLS")
def parallel() -> None:
    calls = call_text("Person", **ADA)
    said: Any = [{"role": "user", "content": f"say: {calls}{calls}"}]
    client = on(TALKER, instructor.Mode.PARALLEL_TOOLS)
    people = client.chat.completions.create(
        model=TALKER_MODEL, messages=said, response_model=Iterable[Person], max_retries=0
    )
    assert [each.model_dump() for each in people] == [ADA, ADA]


if __name__ == "__main__":
    main()
