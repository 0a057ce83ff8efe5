"""A body of OpenAI's API written from a request: the way back of ``gateway/openai``, for tests alone."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from microserve.gateway.grammar.asked import Asked
from microserve.gateway.request.request import Conversation, GenerateRequest, Texts, ToolUse, Turn

WISHES = (
    *("min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "logit_bias", "seed", "stop_token_ids", "ignore_eos", "prompt_logprobs"),
)


def chat_body(request: GenerateRequest) -> dict[str, Any]:
    conversation = request.prompt
    assert isinstance(conversation, Conversation)
    body = _body(request) | {"messages": [_message(turn) for turn in conversation.turns]}
    if (logprobs := request.sampling.logprobs) is not None:
        body |= {"logprobs": True, "top_logprobs": logprobs}
    for name, option in conversation.options.items():
        at, _, inner = option.field.partition(".")
        body |= {at: body.get(at, {}) | {name: option.value}} if inner else {at: option.value}
    return body | ({} if request.tools is None else _tools(request.tools))


def completion_body(request: GenerateRequest) -> dict[str, Any]:
    prompt = request.prompt
    assert not isinstance(prompt, Conversation)
    given: list[Any] = prompt.texts if isinstance(prompt, Texts) else prompt.prompts
    of_its_own = {"echo": request.shows_prompt, "best_of": request.best_of}
    return _body(request) | {"prompt": given, "logprobs": request.sampling.logprobs, **of_its_own}


def _body(request: GenerateRequest) -> dict[str, Any]:
    sampling = request.sampling
    return {
        "model": request.model,
        "n": request.n,
        "stop": request.stop,
        "stream": request.stream,
        "stream_options": {"include_usage": request.shows_usage} if request.stream else None,
        "cache_salt": request.salt,
        "return_tokens_as_token_ids": request.names_by_id,
        request.name_of("max_tokens"): sampling.max_tokens,
        **{name: value for name in WISHES if (value := getattr(sampling, name)) is not None},
        **request.labels,
        "priority": request.gives_way - (request.labels.get("service_tier") == "flex"),
        "truncate_prompt_tokens": request.truncate_prompt_tokens,
        "skip_special_tokens": request.text.skip_special_tokens,
        "spaces_between_special_tokens": request.text.spaces_between_special_tokens,
        "include_stop_str_in_output": request.text.include_stop,
        **({} if request.grammar is None else _grammar(request.grammar)),
    }


def _grammar(asked: Asked) -> dict[str, Any]:
    grammar = asked.grammar
    data = msgspec.json.decode(grammar.text) if grammar.kind in ("json_schema", "choice") else grammar.text
    field, _, member = asked.field.partition(".")
    if field != "response_format":
        return {field: {member: data} if member else data}
    if grammar.kind == "json_object":
        return {field: {"type": "json_object"}}
    return {field: {"type": "json_schema", "json_schema": {"schema": data, "strict": asked.is_strict}}}


def _tools(use: ToolUse) -> dict[str, Any]:
    named = [{"type": "function", "function": {"name": name}} for name in use.callable]
    choice: Any = {"type": "allowed_tools", "allowed_tools": {"mode": use.mode, "tools": named}}
    return {
        "tools": use.shown,
        "tool_choice": named[0] if use.mode == "named" else choice,
        "parallel_tool_calls": not use.one_only,
    }


def _message(turn: Turn) -> dict[str, Any]:
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
        }
        for call in turn.calls
    ]
    return {
        "role": turn.role,
        "content": turn.content,
        "name": turn.name,
        "tool_call_id": turn.tool_call_id,
        "reasoning": turn.thought,
        "tool_calls": calls,
    }
