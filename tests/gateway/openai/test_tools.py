"""Which tools an answer may call, by all that a request says of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from microserve.gateway.api.parse import parse
from microserve.gateway.openai.chat import conversation_of
from microserve.gateway.openai.schema import ChatRequest
from microserve.gateway.openai.tools import tool_use_of
from microserve.gateway.request.prompts import check_template
from microserve.gateway.request.request import TemplateOption, ToolUse
from microserve.gateway.text.prompt.chat_template import ChatTemplate
from microserve.protocol.errors import InvalidRequest


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def request(**fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return parse(json.dumps(body).encode(), ChatRequest)


def use_of(**fields: Any) -> ToolUse | None:
    return tool_use_of(request(**{"tools": [tool("f"), tool("g", strict=True)]} | fields))


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize(
    ("fields", "mode", "names", "one_only", "must_match"),
    [
        ({}, "auto", "fg", False, True),
        ({"tools": [tool("f")]}, "auto", "f", False, False),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, "auto", "fg", True, True),
        ({"tool_choice": "required"}, "required", "fg", False, True),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "named", "g", True, True),
        ({"tool_choice": allowed("auto", "f")}, "auto", "f", False, False),
        ({"tool_choice": allowed("required", "f")}, "required", "f", False, True),
    ],
)
def test_what_may_be_called(
    fields: dict[str, Any], mode: str, names: str, one_only: bool, must_match: bool
) -> None:
    use = use_of(**fields)
    assert use is not None
    assert (use.mode, "".join(use.callable), use.one_only, use.must_match) == (
        mode,
        names,
        one_only,
        must_match,
    )


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"tools": []}, {"tools": None}])
def test_none_may_be_called(fields: dict[str, Any]) -> None:
    assert use_of(**fields) is None


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"tools": [], "tool_choice": "auto"}, "tool_choice"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tools": [tool("f"), tool("no spaces")]}, "tools[1].function.name"),
        ({"tools": [tool("f\n")]}, "tools[0].function.name"),
        ({"tools": [tool("f"), tool("f")]}, "tools[1].function.name"),
        ({"tools": [tool("f", parameters=[])]}, "tools[0].function.parameters"),
        ({"tool_choice": {"type": "function", "function": {"name": "h"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tool_choice": allowed("auto", "h")}, "tool_choice"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        use_of(**fields)
    assert caught.value.field == where


def options_of(body: ChatRequest) -> dict[str, TemplateOption]:
    return conversation_of(body, body.messages).options


LANGUAGE = "chat_template_kwargs.language"


def test_a_template_that_does_not_look_at_something_refuses_it() -> None:
    """It would change nothing, without a word."""
    template = ChatTemplate("{{ messages }}{% if enable_thinking %}x{% endif %}", {})
    options = options_of(request(enable_thinking=True))
    check_template(template, None, options)
    for tools, asked, field in (
        ([tool("f")], options, "tools"),
        (None, options_of(request(reasoning_effort="low")), "reasoning_effort"),
        (None, options_of(request(chat_template_kwargs={"language": "x"})), LANGUAGE),
    ):
        with pytest.raises(InvalidRequest) as caught:
            check_template(template, tools, asked)
        assert caught.value.field == field


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_variables_that_are_not_the_clients(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        options_of(request(chat_template_kwargs={name: 1}))
    assert caught.value.field == f"chat_template_kwargs.{name}"
