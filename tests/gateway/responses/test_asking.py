"""What a body asks for is in its request and nowhere else: a body written from the request asks for the same,
and so does the request that has gone through a helper's pipe; and what is wrong is named."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microserve.gateway.api.parse import parse
from microserve.gateway.request.request import Call, Conversation, GenerateRequest, Turn
from microserve.gateway.responses.asking import responses_request
from microserve.gateway.responses.schema import ResponsesRequest
from microserve.gateway.responses.thought import sealed
from microserve.protocol.errors import InvalidRequest
from tests.support.gateway.responses_bodies import responses_body

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A machine may have other things to do."""

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAMES = st.from_regex(r"[a-z_.\-]{1,8}", fullmatch=True)
OBJECTS = st.dictionaries(TEXTS, st.none() | st.integers() | TEXTS | st.lists(TEXTS, max_size=2), max_size=3)
CALL_IDS = ("call_a", "call_b")


def request(**fields: Any) -> GenerateRequest:
    body = {"model": "m", "input": "hi", **fields}
    return responses_request(parse(json.dumps(body).encode(), ResponsesRequest))


def turns(*items: dict[str, Any], **fields: Any) -> list[Turn]:
    prompt = request(input=list(items), **fields).prompt
    assert isinstance(prompt, Conversation)
    return prompt.turns


def message(role: str, content: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content}


def input_text(text: str) -> dict[str, Any]:
    return {"type": "input_text", "text": text}


def fc(call_id: str, name: str = "f", arguments: str = "{}") -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}


def result(call_id: str, output: Any = "1") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": output}


# --- items -----------------------------------------------------------------------------------------


def test_a_text_is_the_users_message_and_instructions_come_first() -> None:
    prompt = request(instructions="be brief").prompt
    assert prompt == Conversation([Turn(role="system", content="be brief"), Turn(role="user", content="hi")])


def test_all_that_the_system_says_first_is_one_turn() -> None:
    """Many templates know of no second one."""
    found = turns(
        message("system", "a"), message("developer", "b"), message("user", "c"), message("system", "d"),
        instructions="i",
    )  # fmt: skip
    assert [(turn.role, turn.content) for turn in found] == [
        ("system", "i\n\na\n\nb"), ("user", "c"), ("system", "d"),
    ]  # fmt: skip


def test_what_the_assistant_thought_said_and_called_in_a_row_is_one_turn() -> None:
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    said = message("assistant", [{"type": "output_text", "text": "so", "annotations": [], "logprobs": []}])
    found = turns(
        {"role": "user", "content": [input_text("a"), input_text("b")]},
        thought, said, fc("c1", arguments='{"x": 1}'), fc("c2", "g"), result("c1"),
        result("c2", [input_text("2")]), fc("c3"), result("c3"),
    )  # fmt: skip
    assert found == [
        Turn(role="user", content="a\nb"),
        Turn(
            role="assistant",
            content="so",
            thought="hm",
            calls=[Call("c1", "f", {"x": 1}), Call("c2", "g", {})],
        ),
        Turn(role="tool", content="1", tool_call_id="c1", name="f"),
        Turn(role="tool", content="2", tool_call_id="c2", name="g"),
        Turn(role="assistant", content=None, calls=[Call("c3", "f", {})]),
        Turn(role="tool", content="1", tool_call_id="c3", name="f"),
    ]


@pytest.mark.parametrize(
    "thought",
    [
        {"content": [{"type": "reasoning_text", "text": "hm"}]},
        {"summary": [{"type": "summary_text", "text": "hm"}]},
        {"summary": [], "encrypted_content": sealed("hm")},
        {"content": None, "summary": [], "encrypted_content": sealed("hm"), "status": None},
    ],
)
def test_a_thought_comes_back_in_each_form_that_an_answer_gave_it(thought: dict[str, Any]) -> None:
    found = turns({"type": "reasoning", "id": "rs_1", **thought}, message("assistant", "so"))
    assert found == [Turn(role="assistant", content="so", thought="hm")]


def test_two_messages_of_the_assistant_are_two_turns_and_a_thought_alone_is_one() -> None:
    assert turns(message("assistant", "a"), message("assistant", "b")) == [
        Turn(role="assistant", content="a"),
        Turn(role="assistant", content="b"),
    ]
    again = {"type": "reasoning", "summary": [], "encrypted_content": sealed("hm")}
    assert turns(message("assistant", "a"), again, fc("c")) == [
        Turn(role="assistant", content="a"),
        Turn(role="assistant", content=None, thought="hm", calls=[Call("c", "f", {})]),
    ]
    assert turns({"type": "reasoning", "summary": []}) == [Turn(role="assistant", content="")]


IMAGE = [{"type": "input_image", "image_url": "data:,"}]


@pytest.mark.parametrize(
    ("item", "where"),
    [
        ({"type": "web_search_call", "id": "x"}, "input[0].type"),
        ({"type": "item_reference", "id": "msg_x"}, "input[0].id"),
        ({"type": "item_reference"}, "input[0].id"),
        ({"content": "x"}, "input[0].role"),
        (message("tool", "x"), "input[0].role"),
        ({"role": "user"}, "input[0].content"),
        (message("user", IMAGE), "input[0].content[0].type"),
        (message("user", [{"type": "input_text"}]), "input[0].content[0].text"),
        (message("assistant", [{"type": "refusal"}]), "input[0].content[0].refusal"),
        ({"type": "function_call", "name": "f", "arguments": "{}"}, "input[0].call_id"),
        ({"type": "function_call", "call_id": "c", "arguments": "{}"}, "input[0].name"),
        ({"type": "function_call", "call_id": "c", "name": "f"}, "input[0].arguments"),
        (fc("c", arguments="[1]"), "input[0].arguments"),
        (fc("c", arguments="{"), "input[0].arguments"),
        (fc("c", arguments='{"a":' * 480 + "{}" + "}" * 480), "input[0].arguments"),
        (fc("c", name="no spaces"), "input[0].name"),
        (result("c"), "input[0].call_id"),
        ({"type": "reasoning", "encrypted_content": "gAAAA"}, "input[0].encrypted_content"),
        ({"type": "reasoning", "encrypted_content": "ms1.%"}, "input[0].encrypted_content"),
    ],
)
def test_an_item_that_is_none_is_named(item: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        turns(item)
    assert caught.value.field == where
    assert where in caught.value.detail


# --- fields ----------------------------------------------------------------------------------------

F = {"type": "function", "name": "f"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [F, F]}, "tools[1].name"),
        ({"tools": [{**F, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [F], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
        ({"tools": [F], "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tools": [F], "tool_choice": {"type": "allowed_tools", "tools": [F]}}, "tool_choice.mode"),
        ({"tools": [F], "tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice.tools"),
        ({"tools": [F], "tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"verbosity": "loud"}}, "text.verbosity"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"include": ["everything"]}, "include"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include"),
        ({"truncation": "auto"}, "truncation"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ],
)  # fmt: skip
def test_what_is_not_honoured_is_refused_by_name(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        request(**fields)
    assert (caught.value.field or "").startswith(where)


@pytest.mark.parametrize(
    "fields",
    [
        {"truncation": "disabled", "background": False, "store": False, "tools": [], "tool_choice": "auto"},
        {"reasoning": {"summary": "auto", "effort": None}, "text": {"verbosity": "medium"}, "stream": None},
        {"include": ["file_search_call.results"], "max_tool_calls": 1, "prompt_cache_retention": "24h"},
        {"text": {"format": {"type": "text"}}, "user": "u", "metadata": {}, "context_management": []},
    ],
)
def test_what_asks_for_nothing_is_accepted(fields: dict[str, Any]) -> None:
    plain = request()
    asked = request(**fields)
    assert (asked.prompt, asked.sampling, asked.tools, asked.grammar) == (
        plain.prompt, plain.sampling, None, None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "parallel", "mode", "names", "one_only"),
    [
        (None, None, "auto", "fg", False),
        ("required", False, "required", "fg", True),
        ({"type": "function", "name": "g"}, None, "named", "g", True),
        ({"type": "allowed_tools", "mode": "required", "tools": [F]}, True, "required", "f", False),
    ],
)
def test_which_tools_may_be_called(
    choice: Any, parallel: bool | None, mode: str, names: str, one_only: bool
) -> None:
    tools = [
        {**F, "description": "d", "parameters": SCHEMA},
        {"type": "function", "name": "g", "strict": True},
    ]
    use = request(tools=tools, tool_choice=choice, parallel_tool_calls=parallel).tools
    assert use is not None
    assert (use.mode, "".join(use.callable), use.one_only) == (mode, names, one_only)
    assert use.shown == [
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}},
        {"type": "function", "function": {"name": "g", "strict": True}},
    ]
    if "g" in names:
        assert use.functions()["g"].field == "tools[1].parameters"
        assert use.functions()["g"].is_strict


def test_log_probabilities_are_asked_for_by_either_field() -> None:
    include = ["message.output_text.logprobs"]
    assert request().sampling.logprobs is None
    assert request(top_logprobs=0).sampling.logprobs is None
    assert request(include=include).sampling.logprobs == 0
    assert request(include=include, top_logprobs=3).sampling.logprobs == 3
    assert request(top_logprobs=3).sampling.logprobs == 3


# --- there and back --------------------------------------------------------------------------------

CALLS = st.builds(
    lambda call_id, name, arguments: fc(call_id, name, json.dumps(arguments)),
    st.sampled_from(CALL_IDS), NAMES, OBJECTS,
)  # fmt: skip
PARTS = st.lists(TEXTS.map(lambda text: {"type": "input_text", "text": text}), max_size=3)
ITEMS = (
    st.builds(message, st.sampled_from(["system", "developer", "user", "assistant"]), TEXTS | PARTS)
    | CALLS
    | TEXTS.map(lambda text: {"type": "reasoning", "summary": [], "encrypted_content": sealed(text)})
)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Items in any order, with results of calls that were made before."""
    items: list[dict[str, Any]] = []
    for item in draw(st.lists(ITEMS, min_size=1, max_size=6)):
        items.append(item)
        called = sorted({each["call_id"] for each in items if each["type"] == "function_call"})
        if called:
            if not draw(st.booleans()):
                continue
            items.append(result(draw(st.sampled_from(called)), draw(TEXTS | PARTS)))
    return items


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    formats = st.sampled_from(
        [
            {"type": "text"}, {"type": "json_object"},
            {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True},
            {"type": "json_schema", "name": "n", "schema": SCHEMA},
        ]
    )  # fmt: skip
    optional = {
        "instructions": TEXTS,
        "store": st.booleans(),
        "stream": st.booleans(),
        "max_output_tokens": st.integers(1, 1000),
        "temperature": st.floats(0, 100),
        "top_p": st.floats(0.01, 1),
        "top_k": st.integers(-1, 100),
        "seed": st.integers(-(1 << 63), (1 << 63) - 1),
        "presence_penalty": st.floats(-2, 2),
        "min_tokens": st.integers(0, 9),
        "ignore_eos": st.booleans(),
        "top_logprobs": st.integers(0, 20),
        "include": st.lists(
            st.sampled_from(["message.output_text.logprobs", "reasoning.encrypted_content"]), max_size=2
        ),
        "stop": TEXTS.filter(bool) | st.lists(TEXTS.filter(bool), max_size=3),
        "text": st.fixed_dictionaries(
            {}, optional={"format": formats, "verbosity": st.sampled_from(["low", "medium", "high"])}
        ),
        "reasoning": st.fixed_dictionaries({}, optional={"effort": st.sampled_from(["low", "high"])}),
        "metadata": st.dictionaries(TEXTS, TEXTS, max_size=3),
        "user": TEXTS,
        "prompt_cache_key": TEXTS,
        "cache_salt": TEXTS,
        "max_tool_calls": st.integers(1, 9),
    }
    body: dict[str, Any] = draw(
        st.fixed_dictionaries({"model": TEXTS, "input": TEXTS | conversations()}, optional=optional)
    )
    names = draw(st.lists(NAMES, max_size=3, unique=True))
    if names:
        more = {"description": TEXTS, "parameters": OBJECTS, "strict": st.booleans()}
        body["tools"] = [
            draw(st.fixed_dictionaries({"type": st.just("function"), "name": st.just(name)}, optional=more))
            for name in names
        ]
        listed = [{"type": "function", "name": name} for name in names]
        allowed = {"type": "allowed_tools", "mode": "auto", "tools": listed[:1]}
        body["tool_choice"] = draw(st.sampled_from(["none", "auto", "required", None, listed[0], allowed]))
        body["parallel_tool_calls"] = draw(st.booleans() | st.none())
    return body


@UNHURRIED
@given(body=bodies())
def test_a_body_is_what_its_request_says(body: dict[str, Any]) -> None:
    asked = responses_request(parse(json.dumps(body).encode(), ResponsesRequest))
    written = json.dumps(responses_body(asked)).encode()
    again = responses_request(parse(written, ResponsesRequest))
    assert told_alike(again) == told_alike(asked)
    assert msgspec.json.decode(msgspec.json.encode(asked), type=GenerateRequest) == asked


def told_alike(asked: GenerateRequest) -> GenerateRequest:
    """Without what a response only tells again, in the client's own words."""
    return msgspec.structs.replace(asked, echo={}, context=b"")
