"""A body of the Responses API written from a request: the way back of ``gateway/responses``, for tests alone;
and what a client makes of a response's events."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from microserve.gateway.grammar.asked import Asked
from microserve.gateway.request.request import Conversation, GenerateRequest, ToolUse, Turn

WISHES = (
    *("temperature", "top_p", "top_k", "min_p", "min_tokens", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "seed", "ignore_eos"),
)


def responses_body(request: GenerateRequest) -> dict[str, Any]:
    conversation, sampling, again = request.prompt, request.sampling, request.echo["response"]
    assert isinstance(conversation, Conversation)
    options = {option.field: option.value for option in conversation.options.values()}
    include = ["reasoning.encrypted_content"] if request.echo["encrypts"] else []
    if sampling.logprobs is not None:
        include.append("message.output_text.logprobs")
    asked = again["text"]["format"]
    return {
        "model": request.model,
        "input": [item for turn in conversation.turns for item in _items(turn)],
        "stop": request.stop,
        "stream": request.stream,
        "cache_salt": request.salt,
        "max_output_tokens": sampling.max_tokens,
        **{name: getattr(sampling, name) for name in WISHES},
        **request.labels,
        "include": include,
        "top_logprobs": sampling.logprobs,
        "text": {"format": asked | _format(request.grammar), "verbosity": options.get("text.verbosity")},
        "reasoning": {"effort": options.get("reasoning.effort")},
        "max_tool_calls": again["max_tool_calls"],
        **({} if request.tools is None else _tools(request.tools)),
    }


def _format(grammar: Asked | None) -> dict[str, Any]:
    if grammar is None or grammar.grammar.kind == "json_object":
        return {}
    return {"schema": msgspec.json.decode(grammar.grammar.text), "strict": grammar.is_strict}


def _tools(use: ToolUse) -> dict[str, Any]:
    named = [{"type": "function", "name": name} for name in use.callable]
    choice: Any = {"type": "allowed_tools", "mode": use.mode, "tools": named}
    return {
        "tools": [{"type": "function", **tool["function"]} for tool in use.shown],
        "tool_choice": named[0] if use.mode == "named" else choice,
        "parallel_tool_calls": not use.one_only,
    }


def _items(turn: Turn) -> list[dict[str, Any]]:
    if turn.role == "tool":
        return [{"type": "function_call_output", "call_id": turn.tool_call_id, "output": turn.content}]
    items: list[dict[str, Any]] = []
    if turn.thought:
        thought = {"type": "reasoning_text", "text": turn.thought}
        items.append({"type": "reasoning", "summary": [], "content": [thought]})
    if turn.content is not None:
        items.append({"role": turn.role, "content": turn.content})
    for call in turn.calls:
        arguments = json.dumps(call.arguments)
        items.append({"type": "function_call", "call_id": call.id, "name": call.name, "arguments": arguments})
    return items


def folded(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that a client has at the end, who only adds up what it is told; each step is held against the
    order that the API promises."""
    items: list[dict[str, Any]] = []
    is_open = False
    for event in events:
        match event["type"].removeprefix("response."):
            case "output_item.added":
                assert not is_open and event["output_index"] == len(items)
                items.append(event["item"])
                is_open = True
            case "output_item.done":
                assert is_open and event["output_index"] == len(items) - 1
                grown = {**items[-1], "status": event["item"]["status"]}
                if "encrypted_content" in event["item"]:
                    grown["encrypted_content"] = event["item"]["encrypted_content"]
                assert event["item"] == grown
                items[-1] = event["item"]
                is_open = False
            case _:
                assert is_open and event["item_id"] == items[-1]["id"]
                assert event["output_index"] == len(items) - 1
                _grow(items[-1], event)
    assert not is_open
    return items


def _grow(item: dict[str, Any], event: dict[str, Any]) -> None:
    match event["type"].removeprefix("response."):
        case "content_part.added":
            item["content"] = [event["part"]]
        case "content_part.done":
            assert item["content"] == [event["part"]]
        case "output_text.delta":
            item["content"][0]["text"] += event["delta"]
            item["content"][0]["logprobs"] += event["logprobs"]
        case "reasoning_text.delta":
            item["content"][0]["text"] += event["delta"]
        case "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        case "output_text.done":
            part = item["content"][event["content_index"]]
            assert (part["text"], part["logprobs"]) == (event["text"], event["logprobs"])
        case "reasoning_text.done":
            assert item["content"][event["content_index"]]["text"] == event["text"]
        case "function_call_arguments.done":
            assert (item["name"], item["arguments"]) == (event["name"], event["arguments"])
        case other:
            raise AssertionError(f"unexpected event {other}")
