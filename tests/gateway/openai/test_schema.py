"""Bodies: the right ones are read, the wrong ones name their field, and no bytes at all do harm."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from microserve.gateway.api import parse as parsing
from microserve.gateway.api.parse import parse
from microserve.gateway.openai.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from microserve.protocol import log
from microserve.protocol.errors import InvalidRequest

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(sorted({*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__}))


def chat(**fields: Any) -> ChatRequest:
    return parse(json.dumps(CHAT | fields).encode(), ChatRequest)


@given(body=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    for kind in (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest):
        try:
            parse(body, kind)
        except InvalidRequest:
            continue


@given(fields=st.dictionaries(FIELDS | st.text(max_size=8), JSON, max_size=6), allow_nan=st.just(True))
def test_any_json_is_read_or_refused(fields: dict[str, Any], allow_nan: bool) -> None:
    body = json.dumps(CHAT | {"prompt": "p"} | fields, allow_nan=allow_nan).encode("utf-8", "surrogatepass")
    for kind in (ChatRequest, CompletionRequest):
        try:
            parse(body, kind)
        except InvalidRequest as error:
            assert error.detail


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{",
        b"\xff\xfe",
        b'{"model":"\xff"}',
        b'{"model":"m","messages":[],"temperature":NaN}',
        b'{"model":"m","messages":[],"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model":"m","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model":"m","messages":[{"role":"user","content":"\\ud800x"}]}',
    ],
)
def test_what_is_no_json_object(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(body, ChatRequest)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"max_tokens": "16"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"stream": 1}, "stream"),
        ({"stop": [1]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": "y"}}, "logit_bias"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": "hi"}, "messages"),
        ({"tools": ["f"]}, "tools"),
        ({"tools": [{}] * 129}, "tools"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs"),
        ({"response_format": {"type": 1}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}},
            "response_format.json_schema",
        ),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs"),
        ({"structured_outputs": {"disable_any_whitespace": True}}, "structured_outputs"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"functions": [{}]}, "functions"),
        ({"audio": {}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"echo": True}, "echo"),
        ({"echo": 0}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.field is not None
    assert caught.value.field.startswith(where)
    assert where in caught.value.detail


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}},
        {"tools": [{"type": "function"}], "tool_choice": "none"},
        {"functions": [{}], "function_call": "none"},
        {"tools": None, "echo": False, "best_of": 1, "suffix": "", "store": False},
        {"user": "u", "metadata": {"a": "b"}, "parallel_tool_calls": True},
        {"temperature": None, "stop": None, "n": None, "seed": None, "logit_bias": None, "stream": None},
    ],
)
def test_what_asks_for_nothing_is_accepted(fields: dict[str, Any]) -> None:
    assert chat(**fields).model == "m"


def test_a_missing_model_is_named() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(b'{"prompt":"x"}', CompletionRequest)
    assert caught.value.field == "model"


def test_keys_of_logit_bias_are_numbers_in_text() -> None:
    assert chat(logit_bias={"7": 1, "8": -2.5}).logit_bias == {7: 1.0, 8: -2.5}


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """No field has been warned of yet."""
    monkeypatch.setattr(parsing, "_warned", set())


@pytest.mark.usefixtures("forgetful")
def test_an_unknown_field_is_ignored_with_one_event() -> None:
    with capture_logs() as events:
        for _ in range(3):
            assert chat(favourite_colour="blue").model == "m"
    assert [e for e in events if e["event"] == log.HTTP_FIELD_IGNORED] == [
        {"event": log.HTTP_FIELD_IGNORED, "field": "favourite_colour", "log_level": "warning"}
    ]


@pytest.mark.usefixtures("forgetful")
def test_many_unknown_fields_are_not_remembered_for_ever() -> None:
    with capture_logs() as events:
        for at in range(100):
            chat(**{f"unknown_{at}_{i}_" + "x" * 100: i for i in range(20)})
    assert len(events) == 64
    assert all(len(event["field"]) <= 64 for event in events)


def test_msgspec_still_says_where() -> None:
    """``located`` reads msgspec's own words; this fails when they change."""
    with pytest.raises(msgspec.ValidationError, match=r" - at `\$\.n`$"):
        msgspec.json.decode(b'{"model":"m","prompt":"","n":"1"}', type=CompletionRequest)
