"""A body of Anthropic's API written from a request: the way back of ``gateway/anthropic``, for tests."""

from __future__ import annotations

from typing import Any

import msgspec

from microserve.gateway.request.request import Conversation, GenerateRequest, ToolUse, Turn

CHOICES = {"auto": "auto", "required": "any", "named": "tool"}
WISHES = ("max_tokens", "temperature", "top_p", "top_k")


def messages_body(request: GenerateRequest) -> dict[str, Any]:
    conversation = request.prompt
    assert isinstance(conversation, Conversation)
    system, messages = conversation_body(conversation.turns)
    options = {name: option.value for name, option in conversation.options.items()}
    config: dict[str, Any] = {}
    if (effort := options.get("reasoning_effort")) is not None:
        config["effort"] = effort
    body = {
        "model": request.model,
        "messages": messages,
        "system": system,
        **{name: getattr(request.sampling, name) for name in WISHES},
        "stop_sequences": request.stop,
        "stream": request.stream,
        "metadata": request.labels.get("metadata"),
        "service_tier": request.labels.get("service_tier"),
        "thinking": _thinking(request, options.get("enable_thinking")),
        "output_config": config,
        **({} if request.tools is None else _tools(request.tools)),
    }
    if request.grammar is not None:
        wish = {"type": "json_schema", "schema": msgspec.json.decode(request.grammar.grammar.text)}
        if request.grammar.field == "output_format":
            body["output_format"] = wish
        else:
            config["format"] = wish
    return body


def _thinking(request: GenerateRequest, is_enabled: bool | None) -> dict[str, Any] | None:
    if is_enabled is None:
        return None
    if not is_enabled:
        return {"type": "disabled"}
    kind = {"type": "enabled", "budget_tokens": 1024} if request.warnings else {"type": "adaptive"}
    return {**kind, "display": "omitted" if request.hides_thoughts else "summarized"}


def _tools(use: ToolUse) -> dict[str, Any]:
    tools = []
    for tool in use.shown:
        function = dict(tool["function"])
        tools.append({"input_schema": function.pop("parameters"), **function})
    choice: dict[str, Any] = {"type": CHOICES[use.mode], "disable_parallel_tool_use": use.one_only}
    if use.mode == "named":
        [choice["name"]] = use.callable
    return {"tools": tools, "tool_choice": choice}


def conversation_body(turns: list[Turn]) -> tuple[str | None, list[dict[str, Any]]]:
    """``system`` and ``messages`` as an agent writes them: all results of a turn in one message, and what the
    user says behind them."""
    system: str | None = None
    messages: list[dict[str, Any]] = []
    for turn in turns:
        said = [{"type": "text", "text": turn.content}] if turn.content else []
        last: dict[str, Any] = messages[-1] if messages else {"role": ""}
        match turn.role:
            case "system" if not messages:
                system = turn.content
            case "system":
                messages.append({"role": "system", "content": turn.content})
            case "assistant":
                thought = [{"type": "thinking", "thinking": turn.thought}] if turn.thought else []
                calls = [
                    {"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments}
                    for call in turn.calls
                ]
                messages.append({"role": "assistant", "content": [*thought, *said, *calls]})
            case "tool":
                if last["role"] != "user":
                    last = {"role": "user", "content": []}
                    messages.append(last)
                result = {"type": "tool_result", "tool_use_id": turn.tool_call_id, "content": turn.content}
                last["content"].append(result)
            case "user" if last["role"] == "user":
                last["content"] += said
            case "user":
                messages.append({"role": "user", "content": said})
    return system, messages
