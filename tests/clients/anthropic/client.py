"""The ``anthropic`` package: messages whole and streamed, a loop of tools, schemas, counting, its errors."""

from __future__ import annotations

import json
from typing import Any, Literal

import anthropic
from checks import MESH, MESH_MODEL, TALKER, TALKER_MODEL, call_text, check, main
from pydantic import BaseModel

mesh = anthropic.Anthropic(base_url=MESH, api_key="none", max_retries=0, timeout=60)
talker = anthropic.Anthropic(base_url=TALKER, api_key="none", max_retries=0, timeout=60)
USER: list[Any] = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "name": "weather",
    "description": "The weather somewhere.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}


class Person(BaseModel):
    name: str
    age: int
    kind: Literal["child", "adult"]


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": [{"type": "text", "text": f"say: {text}"}]}]


@check("messages, whole")
def whole() -> None:
    message = talker.messages.create(model=TALKER_MODEL, max_tokens=99, messages=said("It is 12 °C. 日本 😀"))
    [block] = message.content
    assert block.type == "text" and block.text == "It is 12 °C. 日本 😀"
    assert (message.role, message.type, message.stop_reason) == ("assistant", "message", "end_turn")
    assert message.usage.input_tokens > 0 and message.usage.output_tokens > 0


@check("messages, streamed: text, and every event")
def streamed() -> None:
    asked: Any = dict(model=TALKER_MODEL, max_tokens=99, messages=said("It is 12 °C. 日本 😀"))
    with talker.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == "It is 12 °C. 日本 😀"
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn" and final.usage.output_tokens > 1
    kinds = [event.type for event in talker.messages.create(**asked, stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


@check("max_tokens, stop_sequences, system, sampling, metadata")
def wishes() -> None:
    message = talker.messages.create(
        model=TALKER_MODEL,
        max_tokens=3,
        messages=said("one two three four"),
        system=[{"type": "text", "text": "Be.", "cache_control": {"type": "ephemeral"}}],
        metadata={"user_id": "u"},
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 40},
    )
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 3)
    message = talker.messages.create(
        model=TALKER_MODEL, max_tokens=99, messages=said("one, two; three"), stop_sequences=["x", "; t"]
    )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "; t")
    assert message.content[0].type == "text" and message.content[0].text == "one, two"


@check("tools: calls, results, an answer, in a loop")
def loop() -> None:
    calls = call_text("weather", city="Paris", unit="C")
    calls += call_text("weather", city="Rome", unit="F")
    for is_streamed in (False, True):
        messages = said(f"Let me see.\n{calls}")
        for reason in ("tool_use", "end_turn"):
            asked: Any = dict(model=TALKER_MODEL, max_tokens=500, messages=messages, tools=[WEATHER])
            if is_streamed:
                with talker.messages.stream(**asked) as stream:
                    message: Any = stream.get_final_message()
            else:
                message = talker.messages.create(**asked)
            assert message.stop_reason == reason
            messages.append({"role": "assistant", "content": message.content})
            results = [
                {"type": "tool_result", "tool_use_id": block.id, "content": f"12 in {block.input['city']}"}
                for block in message.content
                if block.type == "tool_use"
            ]
            messages.append({"role": "user", "content": results})
        assert message.content[0].text == "The tool said 12 in Rome."


@anthropic.beta_tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"12 in {city}"


@check("tool_runner: whole conversations, where there are no threads")
def runner() -> None:
    asked: Any = dict(model=TALKER_MODEL, max_tokens=500, tools=[weather])
    for stream in (False, True):
        messages = said(call_text("weather", city="Rome"))
        run = talker.beta.messages.tool_runner(**asked, messages=messages, stream=stream)
        assert run.until_done().content[0].text == "The tool said 12 in Rome."


@check("tool_choice: any and a named one, strict, whole and streamed")
def required() -> None:
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "weather"}):
        asked: Any = dict(model=MESH_MODEL, max_tokens=500, messages=USER, tool_choice=choice)
        asked["tools"] = [{**WEATHER, "strict": True}]
        with mesh.messages.stream(**asked) as stream:
            parts = [event.partial_json for event in stream if event.type == "input_json"]
            answers = [mesh.messages.create(**asked), stream.get_final_message()]
        for message in answers:
            [block] = message.content
            assert block.type == "tool_use" and message.stop_reason == "tool_use"
            assert isinstance(block.input["city"], str) and block.input["unit"] in ("C", "F")
        assert json.loads("".join(parts)) == answers[1].content[0].input  # type: ignore[union-attr]


@check("parse: a pydantic model")
def parse() -> None:
    message = mesh.messages.parse(model=MESH_MODEL, max_tokens=500, messages=USER, output_format=Person)
    assert isinstance(message.parsed_output, Person)
    with mesh.messages.stream(
        model=MESH_MODEL, max_tokens=500, messages=USER, output_format=Person
    ) as stream:
        assert isinstance(stream.get_final_message().parsed_output, Person)


@check("thinking, and back in the next turn")
def thinking() -> None:
    asked: Any = dict(model=TALKER_MODEL, max_tokens=2000, messages=said("hm</think>Yes."))
    asked["thinking"] = {"type": "enabled", "budget_tokens": 1024}
    with talker.messages.stream(**asked) as stream:
        thoughts = [event.thinking for event in stream if event.type == "thinking"]
        message = stream.get_final_message()
    assert "".join(thoughts) == "hm"
    assert [block.type for block in message.content] == ["thinking", "text"]
    asked["messages"] += [{"role": "assistant", "content": message.content}, *said("ok</think>No.")]
    reply = talker.messages.with_raw_response.create(**asked)
    assert reply.headers["x-microserve-warning"] == "thinking.budget_tokens is not enforced"
    [thought, text] = reply.parse().content
    assert (thought.type, text.type) == ("thinking", "text")


@check("count_tokens")
def count() -> None:
    asked: Any = dict(model=MESH_MODEL, messages=USER, system="Be.", tools=[WEATHER])
    counted = mesh.messages.count_tokens(**asked).input_tokens
    usage = mesh.messages.create(**asked, max_tokens=1).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


@check("errors of its own classes")
def errors() -> None:
    image: Any = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/"}}
    for wrong, kind, words in (
        ({"model": "nobody"}, anthropic.NotFoundError, "nobody"),
        ({"messages": [{"role": "user", "content": [image]}]}, anthropic.BadRequestError, "image"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            anthropic.BadRequestError,
            "tools[0]",
        ),
    ):
        asked: Any = {"model": MESH_MODEL, "max_tokens": 5, "messages": USER, **wrong}
        try:
            mesh.messages.create(**asked)
        except kind as error:
            assert words in error.message and error.request_id, error
            assert error.type in ("not_found_error", "invalid_request_error")
        else:
            raise AssertionError(wrong)


@check("asyncio, many at once")
async def many() -> None:
    import asyncio

    async with anthropic.AsyncAnthropic(base_url=MESH, api_key="none", max_retries=0) as client:
        asked = [client.messages.create(model=MESH_MODEL, max_tokens=20, messages=USER) for _ in range(8)]
        answers = await asyncio.gather(*asked)
    assert all(each.stop_reason in ("end_turn", "max_tokens") for each in answers)


if __name__ == "__main__":
    main()
