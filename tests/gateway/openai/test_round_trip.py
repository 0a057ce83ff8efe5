"""What a body asks for is in its request and nowhere else: a body written from the request asks for the same,
and so does the request that has gone through a helper's pipe."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microserve.gateway.api.parse import parse
from microserve.gateway.openai.chat import chat_request
from microserve.gateway.openai.completions import completion_request
from microserve.gateway.openai.schema import ChatRequest, CompletionRequest
from microserve.gateway.request.request import GenerateRequest
from tests.support.gateway.bodies import chat_body, completion_body

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A machine may have other things to do."""

NAMES = st.from_regex(r"[a-z_.\-]{1,8}", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=3)
TOKEN_IDS = st.integers(0, (1 << 32) - 1)
NUMBERS = {
    "n": st.integers(1, 256),
    "temperature": st.floats(0, 100),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 100),
    "min_p": st.floats(0, 1),
    "min_tokens": st.integers(0, 100),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.5, 2),
    "seed": st.integers(-(1 << 63), (1 << 63) - 1),
    "logit_bias": st.dictionaries(TOKEN_IDS.map(str), st.floats(-100, 100), max_size=3),
    "stop_token_ids": st.lists(TOKEN_IDS, max_size=3),
    "ignore_eos": st.booleans(),
    "max_tokens": st.integers(1, 1000),
    "prompt_logprobs": st.integers(0, 20),
}
SCHEMAS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"type": st.just("object")}, optional={"properties": st.just({"a": {}})}
)
GRAMMARS = st.one_of(
    st.fixed_dictionaries({"schema": SCHEMAS, "strict": st.booleans()}).map(
        lambda each: {"response_format": {"type": "json_schema", "json_schema": each}}
    ),
    st.just({"response_format": {"type": "json_object"}}),
    st.fixed_dictionaries({"guided_regex": st.just("a+")}),
    st.fixed_dictionaries({"guided_json": SCHEMAS}),
    st.lists(TEXTS, min_size=1, max_size=3).map(lambda each: {"structured_outputs": {"choice": each}}),
    st.fixed_dictionaries({"guided_grammar": st.just("start: /a/")}),
    st.just({}),
)  # fmt: skip
COMMON = {
    **NUMBERS,
    "stop": TEXTS.filter(bool) | st.lists(TEXTS.filter(bool), max_size=3),
    "stream": st.booleans(),
    "cache_salt": TEXTS,
    "user": TEXTS,
    "metadata": OBJECTS,
    "service_tier": TEXTS | st.just("flex"),
    "priority": st.integers(0, 100),
    "truncate_prompt_tokens": st.just(-1) | st.integers(1, 100),
    "skip_special_tokens": st.booleans(),
    "spaces_between_special_tokens": st.booleans(),
    "include_stop_str_in_output": st.booleans(),
    "return_tokens_as_token_ids": st.booleans(),
}
CALLS = st.builds(
    lambda id_, name, arguments: {
        "id": id_, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}
    },
    TEXTS, NAMES, OBJECTS,
)  # fmt: skip
PARTS = st.lists(TEXTS.map(lambda text: {"type": "text", "text": text}), max_size=3)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "tool"]), "content": TEXTS | PARTS},
        optional={"name": TEXTS, "tool_call_id": TEXTS},
    )
    | st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": TEXTS | PARTS | st.none()},
        optional={"tool_calls": st.lists(CALLS, max_size=2), "reasoning": TEXTS, "reasoning_content": TEXTS},
    ),
    min_size=1,
    max_size=4,
)


@st.composite
def tools(draw: st.DrawFn) -> dict[str, Any]:
    """``tools`` with a choice that fits them."""
    names = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    optional = {"description": TEXTS, "parameters": OBJECTS, "strict": st.booleans()}
    shown = [
        {
            "type": "function",
            "function": draw(st.fixed_dictionaries({"name": st.just(name)}, optional=optional)),
        }
        for name in names
    ]
    named = [{"type": "function", "function": {"name": name}} for name in names]
    some = draw(st.lists(st.sampled_from(named), min_size=1))
    allowed = {"mode": draw(st.sampled_from(["auto", "required"])), "tools": some}
    choice = draw(
        st.sampled_from(
            ["none", "auto", "required", None, named[0], {"type": "allowed_tools", "allowed_tools": allowed}]
        )
    )
    return {"tools": shown, "tool_choice": choice, "parallel_tool_calls": draw(st.booleans() | st.none())}


@st.composite
def chats(draw: st.DrawFn) -> dict[str, Any]:
    optional = {
        **COMMON,
        "max_completion_tokens": st.integers(1, 1000),
        "reasoning_effort": st.sampled_from(["low", "high"]),
        "enable_thinking": st.booleans(),
        "chat_template_kwargs": st.dictionaries(NAMES, VALUES, max_size=2),
    }
    body: dict[str, Any] = draw(
        st.fixed_dictionaries({"model": TEXTS, "messages": MESSAGES}, optional=optional)
    )
    body |= draw(st.just({}) | st.just({"logprobs": True, "top_logprobs": 3}) | st.just({"logprobs": False}))
    body |= draw(st.just({}) | tools()) | draw(GRAMMARS)
    return _with_usage(draw, body)


@st.composite
def completions(draw: st.DrawFn) -> dict[str, Any]:
    ids = st.lists(TOKEN_IDS, min_size=1, max_size=3)
    prompt = TEXTS | st.lists(TEXTS, min_size=1, max_size=3) | ids | st.lists(ids, min_size=1, max_size=3)
    optional = {
        **COMMON,
        "logprobs": st.integers(0, 20),
        "echo": st.booleans(),
        "best_of": st.integers(1, 256),
    }
    body: dict[str, Any] = draw(st.fixed_dictionaries({"model": TEXTS, "prompt": prompt}, optional=optional))
    if body.get("echo"):
        body["max_tokens"] = draw(st.integers(0, 1000))
    if "best_of" in body:
        body["best_of"] = max(body["best_of"], body.get("n", 1))
    return _with_usage(draw, body | draw(GRAMMARS))


def _with_usage(draw: st.DrawFn, body: dict[str, Any]) -> dict[str, Any]:
    if body.get("stream"):
        body.pop("prompt_logprobs", None)  # told at the end
        body.pop("best_of", None)
        body["stream_options"] = draw(st.none() | st.fixed_dictionaries({"include_usage": st.booleans()}))
    return body


@UNHURRIED
@given(body=chats())
def test_a_conversation_is_what_its_request_says(body: dict[str, Any]) -> None:
    request = chat_request(parse(json.dumps(body).encode(), ChatRequest))
    written = json.dumps(chat_body(request)).encode()
    assert chat_request(parse(written, ChatRequest)) == request
    assert piped(request) == request


@UNHURRIED
@given(body=completions())
def test_a_completion_is_what_its_request_says(body: dict[str, Any]) -> None:
    request = completion_request(parse(json.dumps(body).encode(), CompletionRequest))
    written = json.dumps(completion_body(request)).encode()
    assert completion_request(parse(written, CompletionRequest)) == request
    assert piped(request) == request


def piped(request: GenerateRequest) -> GenerateRequest:
    return msgspec.json.decode(msgspec.json.encode(request), type=GenerateRequest)
