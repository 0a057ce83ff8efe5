"""``langchain-openai``: tools that are bound, the three ways of structured output, an agent."""

from __future__ import annotations

from typing import Any, Literal

from checks import MESH, MESH_MODEL, TALKER, TALKER_MODEL, call_text, check, main
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

mesh = ChatOpenAI(base_url=f"{MESH}/v1", api_key="none", model=MESH_MODEL, max_retries=0)
talker = ChatOpenAI(base_url=f"{TALKER}/v1", api_key="none", model=TALKER_MODEL, max_retries=0)


class Person(BaseModel):
    """Somebody."""

    name: str
    kind: Literal["child", "adult"]


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"12 in {city}"


@check("invoke, stream, batch, usage")
def invoke() -> None:
    answer = talker.invoke("say: Hello.")
    assert answer.content == "Hello."
    assert answer.usage_metadata and answer.usage_metadata["output_tokens"] > 0
    parts = list(talker.stream("say: Hello.", stream_usage=True))
    assert "".join(str(part.content) for part in parts) == "Hello."
    assert any(part.usage_metadata for part in parts)
    assert [each.content for each in talker.batch(["say: One.", "say: Two."])] == ["One.", "Two."]


@check("completions")
def completions() -> None:
    model = OpenAI(base_url=f"{MESH}/v1", api_key="none", model=MESH_MODEL, max_retries=0, max_tokens=8)
    assert isinstance(model.invoke("once"), str)
    assert model.generate(["once", "twice"], stop=["\x07"]).generations


@check("bind_tools: auto, any, by name, strict, streamed")
def bind_tools() -> None:
    asked = f"say: I look.{call_text('weather', city='Paris')}"
    for answer in (
        talker.bind_tools([weather]).invoke(asked),
        sum_of(talker.bind_tools([weather]).stream(asked)),
    ):
        assert answer.content == "I look."
        assert [(each["name"], each["args"]) for each in answer.tool_calls] == [
            ("weather", {"city": "Paris"})
        ]
    for wish in ("any", "required", "weather", True):
        for strict in (None, True):
            bound = mesh.bind_tools([weather], tool_choice=wish, strict=strict, parallel_tool_calls=False)
            for answer in (bound.invoke("hi"), sum_of(bound.stream("hi"))):
                [call] = answer.tool_calls
                assert call["name"] == "weather" and "city" in call["args"]
                assert not answer.invalid_tool_calls


def sum_of(parts: Any) -> AIMessage:
    first, *others = parts
    whole: AIMessageChunk = first
    for part in others:
        whole += part
    return whole


@check("with_structured_output: json_schema, function_calling, json_mode")
def structured() -> None:
    for method, strict in (("json_schema", True), ("json_schema", None), ("function_calling", True),
                           ("function_calling", None)):  # fmt: skip
        bound = mesh.with_structured_output(Person, method=method, strict=strict, include_raw=True)
        answer: Any = bound.invoke("hi")
        assert isinstance(answer["parsed"], Person), (method, answer)
        *_, last = mesh.with_structured_output(Person, method=method, strict=strict).stream("hi")
        assert isinstance(last, Person)
    in_words = talker.with_structured_output(Person, method="json_mode")
    assert in_words.invoke('as JSON, say: {"name": "Ada", "kind": "adult"}') == Person(
        name="Ada", kind="adult"
    )
    free: Any = mesh.with_structured_output(None, method="json_mode").invoke("JSON, please")
    assert isinstance(free, dict)


@check("the Responses API: invoke, stream, bind_tools, with_structured_output")
def responses() -> None:
    options: Any = {"api_key": "none", "max_retries": 0, "use_responses_api": True}
    saying = ChatOpenAI(base_url=f"{TALKER}/v1", model=TALKER_MODEL, **options)
    assert saying.invoke("say: Hello.").text == "Hello."
    assert "".join(part.text for part in saying.stream("say: Hello.")) == "Hello."
    meshed = ChatOpenAI(base_url=f"{MESH}/v1", model=MESH_MODEL, **options)
    bound = meshed.bind_tools([weather], tool_choice="weather", parallel_tool_calls=False)
    for answer in (bound.invoke("hi"), sum_of(bound.stream("hi"))):
        [call] = answer.tool_calls
        assert call["name"] == "weather" and "city" in call["args"]
    assert isinstance(meshed.with_structured_output(Person, method="json_schema").invoke("hi"), Person)
    built: Any = create_agent(saying, [weather])
    state = built.invoke({"messages": [HumanMessage(f"say: {call_text('weather', city='Rome')}")]})
    assert state["messages"][-1].text == "The tool said 12 in Rome."


@check("an agent: calls, results, an answer")
def agent() -> None:
    built: Any = create_agent(talker, [weather])
    asked = f"say: {call_text('weather', city='Rome')}"
    state = built.invoke({"messages": [HumanMessage(asked)]})
    assert state["messages"][-1].content == "The tool said 12 in Rome."


if __name__ == "__main__":
    main()
