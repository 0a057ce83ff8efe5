"""Probes of ``client.responses``; what its answers are in full is ``tests/gateway/responses/``'s."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from tests.gateway.probes.probe import SAYS, Bench, probe
from tests.support.gateway.talking_model import TOOLS, call

FLAT: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]


def ask(bench: Bench, **fields: Any) -> Any:
    return bench.client.responses.create(**{"model": "tiny", "input": "hi", **fields})


@probe("`responses.create`")
def plain(bench: Bench) -> None:
    reply = ask(bench, instructions="short")
    assert (reply.output_text, reply.status, reply.object) == (SAYS, "completed", "response")
    assert bench.prompt().startswith("<|im_start|>system\nshort<|im_end|>")


@probe("`responses.create(stream=True)`")
def stream(bench: Bench) -> None:
    events = list(ask(bench, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == SAYS and events[-1].type == "response.completed"


@probe("`responses.parse` with a pydantic model", says='{"name": "Ada"}')
def parsed(bench: Bench) -> None:
    class Person(BaseModel):
        name: str

    reply = bench.client.responses.parse(model="tiny", input="hi", text_format=Person)
    assert reply.output_parsed == Person(name="Ada")


@probe("a function called by a response", says=call("weather", city="Z"))
def called(bench: Bench) -> None:
    [item] = ask(bench, tools=FLAT).output
    assert (item.type, item.name, json.loads(item.arguments)) == ("function_call", "weather", {"city": "Z"})


@probe("a tool that OpenAI itself runs (`web_search`)", refused=400, param="tools[0].type")
def built_in(bench: Bench) -> None:
    ask(bench, tools=[{"type": "web_search"}])


@probe("`background=True`", refused=400, param="background")
def background(bench: Bench) -> None:
    ask(bench, background=True)
