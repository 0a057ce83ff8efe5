"""``litellm``, which many programs speak through."""

from __future__ import annotations

import json
from typing import Any

import litellm
from checks import MESH, MESH_MODEL, TALKER, TALKER_MODEL, call_text, check, main
from pydantic import BaseModel

litellm.suppress_debug_info = True
ON_MESH: dict[str, Any] = {"model": f"hosted_vllm/{MESH_MODEL}", "api_base": f"{MESH}/v1", "api_key": "none"}
ON_TALKER: dict[str, Any] = {"model": f"openai/{TALKER_MODEL}", "api_base": f"{TALKER}/v1", "api_key": "none"}
USER = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Person(BaseModel):
    name: str
    is_child: bool


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"say: {text}"}]


@check("completion, streamed, put together")
def completion() -> None:
    assert litellm.completion(**ON_TALKER, messages=said("Hello.")).choices[0].message.content == "Hello."
    parts = list(litellm.completion(**ON_TALKER, messages=said("Hello."), stream=True))
    whole: Any = litellm.stream_chunk_builder(parts)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("Hello.", "stop")


@check("tools: auto, required, streamed")
def tools() -> None:
    asked = said(call_text("weather", city="Paris") + call_text("weather", city="Rome"))
    parts = list(litellm.completion(**ON_TALKER, messages=asked, tools=[WEATHER], stream=True))
    for answer in (
        litellm.completion(**ON_TALKER, messages=asked, tools=[WEATHER]),
        litellm.stream_chunk_builder(parts),
    ):
        [choice] = answer.choices
        calls: Any = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls"
        assert [json.loads(each.function.arguments) for each in calls] == [
            {"city": "Paris"},
            {"city": "Rome"},
        ]
        assert len({each.id for each in calls}) == 2
    answer = litellm.completion(**ON_MESH, messages=USER, tools=[WEATHER], tool_choice="required")
    assert "city" in json.loads(answer.choices[0].message.tool_calls[0].function.arguments)


@check("response_format: a pydantic model")
def structured() -> None:
    answer = litellm.completion(**ON_MESH, messages=USER, response_format=Person)
    Person.model_validate_json(answer.choices[0].message.content)


@check("thoughts")
def thoughts() -> None:
    kwargs = {"chat_template_kwargs": {"enable_thinking": True}}
    answer = litellm.completion(**ON_TALKER, messages=said("hm</think>Yes."), extra_body=kwargs)
    message: Any = answer.choices[0].message
    assert (message.content, message.reasoning_content) == ("Yes.", "hm")


@check("responses, whole and streamed")
def responses() -> None:
    answer: Any = litellm.responses(**ON_TALKER, input="say: Hello.")
    assert answer.output[0].content[0].text == "Hello."
    events: Any = litellm.responses(**ON_TALKER, input="say: Hello.", stream=True)
    assert "".join(each.delta for each in events if each.type == "response.output_text.delta") == "Hello."


@check("text_completion")
def text_completion() -> None:
    on: Any = {**ON_MESH, "model": f"text-completion-openai/{MESH_MODEL}"}
    answer = litellm.text_completion(**on, prompt="once", max_tokens=8)
    assert isinstance(answer.choices[0].text, str)


@check("errors of its own classes")
def errors() -> None:
    for wrong, kind in (
        ({"temperature": -1}, litellm.BadRequestError),
        ({"model": "openai/no"}, litellm.NotFoundError),
    ):
        try:
            litellm.completion(**{**ON_TALKER, "messages": USER, **wrong})
        except kind:
            continue
        raise AssertionError(wrong)


if __name__ == "__main__":
    main()
