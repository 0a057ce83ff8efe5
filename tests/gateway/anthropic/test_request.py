"""A body of the Messages API becomes what the core understands, or is refused by the field's name."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from microserve.gateway.anthropic.request import into_request
from microserve.gateway.anthropic.schema import MessagesRequest
from microserve.gateway.api.parse import parse
from microserve.gateway.grammar.asked import Asked
from microserve.gateway.request.request import (
    Conversation,
    GenerateRequest,
    SamplingWish,
    TemplateOption,
    ToolUse,
    Turn,
)
from microserve.protocol.errors import InvalidRequest
from microserve.protocol.messages.request.sampling import Grammar

BODY: dict[str, Any] = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}


def parsed(**fields: Any) -> MessagesRequest:
    return parse(json.dumps(BODY | fields).encode(), MessagesRequest)


def request(**fields: Any) -> GenerateRequest:
    return into_request(parsed(**fields))


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "input_schema": CITY, **fields}


def test_a_body_with_everything() -> None:
    found = request(
        system="Be.",
        stop_sequences=["END", "\n\n"],
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        stream=True,
        metadata={"user_id": "u1"},
        service_tier="auto",
        tools=[
            tool("f", description="F.", strict=True, **{"cache_control": {"type": "ephemeral"}}),
            tool("g"),
        ],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        thinking={"type": "enabled", "budget_tokens": 2048},
        output_config={"effort": "high"},
        cache_control={"type": "ephemeral"},
    )
    shown = [
        {
            "type": "function",
            "function": {"name": "f", "description": "F.", "parameters": CITY, "strict": True},
        },
        {"type": "function", "function": {"name": "g", "parameters": CITY}},
    ]
    assert found == GenerateRequest(
        model="m",
        prompt=Conversation(
            [Turn(role="system", content="Be."), Turn(role="user", content="hi")],
            {
                "enable_thinking": TemplateOption(True, "thinking", is_hint=True),
                "reasoning_effort": TemplateOption("high", "output_config.effort", is_hint=True),
            },
            folds_system=True,
        ),
        sampling=SamplingWish(max_tokens=5, is_max_cut=True, temperature=0.5, top_p=0.9, top_k=4),
        stop=["END", "\n\n"],
        stream=True,
        tools=ToolUse(
            shown=shown, callable=["f", "g"], mode="required", one_only=True, schema_field="input_schema"
        ),
        labels={"user": "u1", "metadata": {"user_id": "u1"}, "service_tier": "auto"},
        names={"prompt": "messages", "stop": "stop_sequences", "user": "metadata.user_id"},
        warnings=["thinking.budget_tokens is not enforced"],
    )
    assert msgspec.json.decode(msgspec.json.encode(found), type=GenerateRequest) == found


@pytest.mark.parametrize(
    ("choice", "names", "mode", "one_only"),
    [
        (None, "fg", "auto", False),
        ({"type": "auto"}, "fg", "auto", False),
        ({"type": "auto", "disable_parallel_tool_use": True}, "fg", "auto", True),
        ({"type": "any"}, "fg", "required", False),
        ({"type": "tool", "name": "g"}, "g", "named", True),
        ({"type": "tool", "name": "g", "disable_parallel_tool_use": False}, "g", "named", True),
    ],
)
def test_which_tools_may_be_called(choice: Any, names: str, mode: str, one_only: bool) -> None:
    use = request(tools=[tool("f", type="custom"), tool("g", type=None)], tool_choice=choice).tools
    assert use is not None
    assert ("".join(use.callable), use.mode, use.one_only, len(use.shown)) == (names, mode, one_only, 2)


def test_no_tools() -> None:
    assert request(tools=[tool("f")], tool_choice={"type": "none"}).tools is None
    assert request(tools=[]).tools is None
    assert request(tool_choice={"type": "auto"}).tools is None


@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_an_answer_by_a_schema(field: str) -> None:
    wish = {"type": "json_schema", "schema": CITY}
    found = request(**{field: {"format": wish} if field == "output_config" else wish}).grammar
    grammar = Grammar(kind="json_schema", text=json.dumps(CITY, separators=(",", ":")))
    assert found == Asked(
        grammar, {"output_config": "output_config.format"}.get(field, field), is_strict=True
    )


@pytest.mark.parametrize(
    ("thinking", "option", "warnings", "is_hidden"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, True, ["thinking.budget_tokens is not enforced"], False),
        ({"type": "adaptive", "display": "summarized"}, True, [], False),
        ({"type": "adaptive", "display": "omitted"}, True, [], True),
        ({"type": "disabled"}, False, [], False),
    ],
)
def test_how_it_thinks(thinking: Any, option: bool, warnings: list[str], is_hidden: bool) -> None:
    found = request(thinking=thinking)
    assert isinstance(found.prompt, Conversation)
    assert found.prompt.options == {"enable_thinking": TemplateOption(option, "thinking", is_hint=True)}
    assert (found.warnings, found.hides_thoughts) == (warnings, is_hidden)


WEB = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
BASH = {"type": "bash_20250124", "name": "bash"}
BOTH = {
    "output_config": {"format": {"type": "json_schema", "schema": {}}},
    "output_format": {"type": "json_schema", "schema": {}},
}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"max_tokens": None}, "max_tokens", "Expected `int`"),
    ({"max_tokens": 0}, "max_tokens", ">= 1"),
    ({"temperature": -0.1}, "temperature", ">= 0"),
    ({"top_k": -1}, "top_k", ">= 0"),
    ({"stop_sequences": [""]}, "stop_sequences[0]", "length >= 1"),
    ({"tools": [WEB]}, "tools[0].type", "'web_search_20250305' is not supported"),
    ({"tools": [tool("f"), BASH]}, "tools[1].type", "'bash_20250124' is not supported"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema", "missing"),
    ({"tools": [tool("f"), tool("f")]}, "tools[1].name", "'f' is there twice"),
    ({"tools": [tool("f", defer_loading=True)]}, "tools[0].defer_loading", "is not supported"),
    ({"tools": [tool("f", defer_loading=0)]}, "tools[0].defer_loading", "is not supported"),
    ({"tools": [tool("f", input_examples=[{}])]}, "tools[0].input_examples", "is not supported"),
    ({"tools": [tool("f", allowed_callers=["x"])]}, "tools[0].allowed_callers", "is not supported"),
    ({"tool_choice": {"type": "any"}}, "tool_choice", "needs tools"),
    ({"tools": [tool("f")], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice", "none of the"),
    ({"tools": [tool("f")], "tool_choice": {"type": "required"}}, "tool_choice.type", "'required' is"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens", "missing"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1}}, "thinking.budget_tokens", ">= 1024"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type", "'between_tools' is not supported"),
    ({"output_config": {"task_budget": {}}}, "output_config.task_budget", "unknown field"),
    ({"output_config": {"effort": "none"}}, "output_config.effort", "'none' is not supported"),
    ({"output_format": {"type": "json_object"}}, "output_format.type", "'json_object' is not supported"),
    (BOTH, "output_format", "exclude each other"),
    ({"container": "c"}, "container", "is not supported"),
    ({"mcp_servers": [{}]}, "mcp_servers", "is not supported"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management", "not"),
    ({"speed": "fast"}, "speed", "is not supported"),
    ({"inference_geo": "eu"}, "inference_geo", "is not supported"),
    ({"system": [{"type": "image"}]}, "system[0].type", "'image' is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "field", "words"), REFUSED, ids=lambda each: str(each)[:40])
def test_what_is_refused_is_named(fields: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        request(**fields)
    assert (error.value.field, words in error.value.detail) == (field, True), error.value.detail


def test_what_asks_for_nothing_is_let_through() -> None:
    nothing: dict[str, Any] = {
        "container": None, "mcp_servers": [], "speed": "standard", "fallbacks": [], "user_profile_id": "p",
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    }  # fmt: skip
    assert request(**nothing) == request()
