"""The ``openai`` package: the shapes that it parses, and its helpers."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from checks import MESH, MESH_MODEL, TALKER, TALKER_MODEL, call_text, check, main
from pydantic import BaseModel

mesh = openai.OpenAI(base_url=f"{MESH}/v1", api_key="none", max_retries=0, timeout=60)
talker = openai.OpenAI(base_url=f"{TALKER}/v1", api_key="none", max_retries=0, timeout=60)
USER: list[Any] = [{"role": "user", "content": "hello"}]


class Person(BaseModel):
    name: str
    age: int
    kind: Literal["child", "adult"]


class Weather(BaseModel):
    """The weather somewhere."""

    city: str
    unit: Literal["C", "F"]


WEATHER = openai.pydantic_function_tool(Weather)


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": f"say: {text}"}]


@check("models")
def models() -> None:
    [model] = mesh.models.list()
    assert model.id == MESH_MODEL and mesh.models.retrieve(MESH_MODEL).id == MESH_MODEL


@check("chat")
def chat() -> None:
    answer = talker.chat.completions.create(model=TALKER_MODEL, messages=said("It is 12 °C. 日本 😀"))
    [choice] = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("It is 12 °C. 日本 😀", "stop")
    assert answer.usage and answer.usage.total_tokens > answer.usage.completion_tokens > 0


@check("chat, streamed")
def chat_streamed() -> None:
    stream = talker.chat.completions.create(
        model=TALKER_MODEL,
        messages=said("It is 12 °C. 日本 😀"),
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == "It is 12 °C. 日本 😀"
    assert chunks[-1].usage and not chunks[-1].choices


@check("n, logprobs, seed, stop")
def wishes() -> None:
    first, second = [
        mesh.chat.completions.create(
            model=MESH_MODEL, messages=USER, n=2, seed=7, temperature=1.0, logprobs=True, top_logprobs=3,
            max_completion_tokens=12, stop=["\x07"], logit_bias={"5": -100}, user="me", metadata={"a": "b"},
        )
        for _ in range(2)
    ]  # fmt: skip
    assert [choice.message.content for choice in first.choices] == [
        choice.message.content for choice in second.choices
    ]
    for choice in first.choices:
        assert choice.logprobs and choice.logprobs.content
        assert all(len(entry.top_logprobs) == 3 for entry in choice.logprobs.content)


@check("parse: a pydantic model, whole and streamed")
def parse() -> None:
    answer = mesh.chat.completions.parse(model=MESH_MODEL, messages=USER, response_format=Person)
    assert isinstance(answer.choices[0].message.parsed, Person)
    with mesh.chat.completions.stream(model=MESH_MODEL, messages=USER, response_format=Person) as stream:
        kinds = {event.type for event in stream}
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Person)
    assert {"chunk", "content.delta", "content.done"} <= kinds


@check("tools: required and named, strict, parsed, whole and streamed")
def tools() -> None:
    named: Any = {"type": "function", "function": {"name": "Weather"}}
    for choice, reason in (("required", "tool_calls"), (named, "stop")):
        asked: Any = dict(model=MESH_MODEL, messages=USER, tools=[WEATHER], tool_choice=choice)
        asked["parallel_tool_calls"] = False
        whole = mesh.chat.completions.parse(**asked).choices[0]
        with mesh.chat.completions.stream(**asked) as stream:
            names = [event.name for event in stream if event.type == "tool_calls.function.arguments.done"]
            streamed = stream.get_final_completion().choices[0]
        for one in (whole, streamed):
            assert one.finish_reason == reason
            [call] = one.message.tool_calls or []
            assert isinstance(call.function.parsed_arguments, Weather)
        assert names == ["Weather"]


@check("tools: calls, results, an answer, in a loop")
def loop() -> None:
    calls = call_text("Weather", city="Paris", unit="C")
    calls += call_text("Weather", city="Rome", unit="F")
    for streamed in (False, True):
        messages = said(f"Let me see.\n{calls}")
        for _ in range(2):
            asked: Any = dict(model=TALKER_MODEL, messages=messages, tools=[WEATHER])
            if streamed:
                with talker.chat.completions.stream(**asked) as stream:
                    message: Any = stream.get_final_completion().choices[0].message
            else:
                message = talker.chat.completions.create(**asked).choices[0].message
            messages.append(message.to_dict())
            for call in message.tool_calls or []:
                city = json.loads(call.function.arguments)["city"]
                messages.append({"role": "tool", "tool_call_id": call.id, "content": f"12 in {city}"})
        assert message.content == "The tool said 12 in Rome."


@check("thoughts")
def thoughts() -> None:
    stream = talker.chat.completions.create(
        model=TALKER_MODEL,
        messages=said("hm</think>Yes."),
        stream=True,
        extra_body={"chat_template_kwargs": {"enable_thinking": True}},
    )
    deltas = [choice.delta for chunk in stream for choice in chunk.choices]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "hm"
    assert "".join(delta.content or "" for delta in deltas) == "Yes."


@check("completions, whole and streamed, logprobs")
def completions() -> None:
    asked: Any = dict(model=MESH_MODEL, prompt=["one", "two"], max_tokens=8, temperature=0.0)
    asked["extra_body"] = {"ignore_eos": True}
    whole = mesh.completions.create(**asked, logprobs=2)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert all(choice.logprobs and choice.logprobs.token_logprobs for choice in whole.choices)
    texts = ["", ""]
    for chunk in mesh.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


@check("responses: whole and streamed, instructions, thoughts")
def responses() -> None:
    asked: Any = dict(model=TALKER_MODEL, input="say: 12 °C. 日本 😀", instructions="Be brief.")
    whole = talker.responses.create(**asked)
    assert (whole.output_text, whole.status) == ("12 °C. 日本 😀", "completed")
    assert whole.usage and whole.usage.output_tokens > 0
    with talker.responses.stream(**asked) as stream:
        events = list(stream)
        assert stream.get_final_response().output_text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (
        "".join(each.delta for each in events if each.type == "response.output_text.delta")
        == whole.output_text
    )
    thought, text = talker.responses.create(model=TALKER_MODEL, input="say: <think>hm</think>Yes.").output
    assert thought.type == "reasoning" and thought.content and thought.content[0].text == "hm"
    assert text.type == "message"


@check("responses: parse, whole and streamed; tools that are required")
def responses_parsed() -> None:
    asked: Any = dict(model=MESH_MODEL, input="hello", text_format=Person)
    assert isinstance(mesh.responses.parse(**asked).output_parsed, Person)
    with mesh.responses.stream(**asked) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_response().output_parsed, Person)
    tool = {**WEATHER["function"], "type": "function"}
    named: Any = {"type": "function", "name": "Weather"}
    for wish in ("required", named):
        answer = mesh.responses.parse(
            model=MESH_MODEL, input="hello", tools=[tool], tool_choice=wish, parallel_tool_calls=False
        )
        [call] = answer.output
        assert call.type == "function_call" and Weather.model_validate_json(call.arguments)


@check("responses: calls, results, an answer, in a loop")
def responses_loop() -> None:
    tool: Any = {**WEATHER["function"], "type": "function"}
    for streamed in (False, True):
        items: Any = [
            {"role": "user", "content": f"say: I look.{call_text('Weather', city='Rome', unit='C')}"}
        ]
        for _ in range(2):
            asked: Any = dict(model=TALKER_MODEL, input=items, tools=[tool], store=False)
            if streamed:
                with talker.responses.stream(**asked) as stream:
                    for _event in stream:
                        pass
                    answer: Any = stream.get_final_response()
            else:
                answer = talker.responses.create(**asked)
            items += answer.output
            for call in answer.output:
                if call.type == "function_call":
                    city = json.loads(call.arguments)["city"]
                    output = {
                        "type": "function_call_output",
                        "call_id": call.call_id,
                        "output": f"12 in {city}",
                    }
                    items.append(output)
        assert answer.output_text == "The tool said 12 in Rome."


@check("responses: kept, gone on from, deleted")
def responses_kept() -> None:
    first = talker.responses.create(model=TALKER_MODEL, input="say: One.")
    more = talker.responses.create(model=TALKER_MODEL, input="say: Two.", previous_response_id=first.id)
    assert more.output_text == "Two." and more.usage and first.usage
    assert more.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    assert talker.responses.retrieve(first.id).output_text == "One."
    talker.responses.delete(first.id)
    try:
        talker.responses.retrieve(first.id)
    except openai.NotFoundError:
        return
    raise AssertionError("it is still there")


@check("errors of its own classes")
def errors() -> None:
    for wrong, kind, field in (
        ({"model": "nobody"}, openai.NotFoundError, "model"),
        ({"temperature": -1.0}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "max_tokens"),
    ):
        asked: Any = {"model": MESH_MODEL, "messages": USER, **wrong}
        try:
            mesh.chat.completions.create(**asked)
        except kind as error:
            assert error.param == field and error.message, error
        else:
            raise AssertionError(wrong)


@check("asyncio, many at once")
async def many() -> None:
    import asyncio

    async with openai.AsyncOpenAI(base_url=f"{MESH}/v1", api_key="none", max_retries=0) as client:
        asked = [
            client.chat.completions.parse(model=MESH_MODEL, messages=USER, response_format=Person, seed=seed)
            for seed in range(8)
        ]
        answers = await asyncio.gather(*asked)
    assert all(isinstance(each.choices[0].message.parsed, Person) for each in answers)


if __name__ == "__main__":
    main()
