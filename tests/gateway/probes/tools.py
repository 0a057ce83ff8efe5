"""Probes of tools: asked for, streamed, required, and their results going back."""

from __future__ import annotations

import json
from typing import Any

import openai
from pydantic import BaseModel

from tests.gateway.probes.probe import SAYS, USER, Bench, probe
from tests.support.gateway.talking_model import TOOLS, call

CITY = "Z\u00fcrich"
WEATHER = call("weather", city=CITY)
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


def calls_of(reply: Any) -> list[tuple[str, Any]]:
    message = reply.choices[0].message
    return [(each.function.name, json.loads(each.function.arguments)) for each in message.tool_calls or []]


@probe('`tools`, `tool_choice="auto"`', says=WEATHER)
def auto(bench: Bench) -> None:
    for choice in ({}, {"tool_choice": "auto"}):
        reply = bench.chat(tools=TOOLS, **choice)
        assert calls_of(reply) == [("weather", {"city": CITY})]
        assert (reply.choices[0].finish_reason, reply.choices[0].message.content) == ("tool_calls", None)


@probe("`tools` that the model does not use")
def unused(bench: Bench) -> None:
    reply = bench.chat(tools=TOOLS)
    assert (reply.choices[0].message.content, reply.choices[0].message.tool_calls) == (SAYS, None)


@probe("two calls at a time", says=f"{WEATHER}\n{call('now')}")
def parallel(bench: Bench) -> None:
    reply = bench.chat(tools=TOOLS, parallel_tool_calls=True)
    assert calls_of(reply) == [("weather", {"city": CITY}), ("now", {})]
    assert len({each.id for each in reply.choices[0].message.tool_calls}) == 2


@probe("`parallel_tool_calls=False`", says=f"{WEATHER}\n{call('now')}")
def one_only(bench: Bench) -> None:
    assert calls_of(bench.chat(tools=TOOLS, parallel_tool_calls=False)) == [("weather", {"city": CITY})]


@probe("deltas of a streamed call", says=WEATHER)
def streamed(bench: Bench) -> None:
    deltas = [
        each
        for chunk in bench.chat(tools=TOOLS, stream=True)
        for each in chunk.choices[0].delta.tool_calls or []
    ]
    first = deltas[0]
    assert (first.index, first.type, first.function.name) == (0, "function", "weather") and first.id
    assert all(each.id is None and each.index == 0 for each in deltas[1:])
    assert json.loads("".join(each.function.arguments or "" for each in deltas)) == {"city": CITY}


@probe('`tool_choice="none"`')
def none(bench: Bench) -> None:
    bench.chat(tools=TOOLS, tool_choice="none")
    assert "weather" not in bench.prompt()


@probe('`tool_choice="required"`', says=WEATHER)
def required(bench: Bench) -> None:
    assert calls_of(bench.chat(tools=TOOLS, tool_choice="required")) == [("weather", {"city": CITY})]
    assert bench.asked().message.sampling.grammar is not None


@probe("a named function", says=WEATHER)
def named(bench: Bench) -> None:
    reply = bench.chat(tools=TOOLS, tool_choice=NAMED)
    assert calls_of(reply) == [("weather", {"city": CITY})]
    assert bench.asked().message.sampling.grammar is not None


@probe("a named function that is none of the tools", refused=400, param="tool_choice")
def named_wrong(bench: Bench) -> None:
    bench.chat(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "other"}})


@probe("`tool_choice` without `tools`", refused=400, param="tool_choice")
def choice_of_nothing(bench: Bench) -> None:
    bench.chat(tool_choice="required")


@probe("`allowed_tools`", says=WEATHER)
def allowed(bench: Bench) -> None:
    choice: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}
    assert calls_of(bench.chat(tools=TOOLS, tool_choice=choice)) == [("weather", {"city": CITY})]
    assert "now" in bench.prompt()


@probe("a strict function", says=WEATHER)
def strict(bench: Bench) -> None:
    function = TOOLS[0]["function"]
    schema = {**function["parameters"], "additionalProperties": False}
    tool: Any = {"type": "function", "function": {**function, "parameters": schema, "strict": True}}
    assert calls_of(bench.chat(tools=[tool])) == [("weather", {"city": CITY})]
    assert bench.asked().message.sampling.grammar is not None


@probe("`openai.pydantic_function_tool` and `.parse`", says=WEATHER)
def parsed(bench: Bench) -> None:
    class Weather(BaseModel):
        city: str

    tool = openai.pydantic_function_tool(Weather, name="weather")
    reply = bench.client.chat.completions.parse(model="tiny", messages=USER, tools=[tool])
    [made] = reply.choices[0].message.tool_calls or []
    assert made.function.parsed_arguments == Weather(city=CITY)


@probe("a tool's result goes back", says="It rains.")
def result(bench: Bench) -> None:
    made: Any = {
        "id": "c1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Z"}'},
    }
    history: Any = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    assert bench.chat(messages=history, tools=TOOLS).choices[0].message.content == "It rains."
    assert "<|im_start|>tool\nrain<|im_end|>" in bench.prompt()


@probe(
    "arguments that are not JSON go back", refused=400, param="messages[1].tool_calls[0].function.arguments"
)
def broken_arguments(bench: Bench) -> None:
    made: Any = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{"}}
    bench.chat(messages=[*USER, {"role": "assistant", "content": None, "tool_calls": [made]}])


@probe("a tool without a name", refused=400, param="tools[0].function.name")
def nameless(bench: Bench) -> None:
    bench.chat(tools=[{"type": "function", "function": {}}])


@probe("a tool of type `custom`", refused=400, param="tools[0].type")
def custom(bench: Bench) -> None:
    bench.chat(tools=[{"type": "custom", "custom": {"name": "f"}}])


@probe("the old `functions` and `function_call`", refused=400, param="functions")
def functions(bench: Bench) -> None:
    bench.chat(functions=[{"name": "f", "parameters": {}}])
