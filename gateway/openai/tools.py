"""What a chat request says of tools: which the model may call, whether it must, and how many at once.

Owns ``tools``, ``tool_choice`` and ``parallel_tool_calls`` together, and the tools' types.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import msgspec

from microserve.gateway.openai.messages import Tool, ToolChoice
from microserve.gateway.openai.schema import ChatRequest
from microserve.gateway.request.request import Mode, ToolUse
from microserve.protocol.errors import InvalidRequest, located


def tool_use_of(request: ChatRequest) -> ToolUse | None:
    """None without tools, or if none may be called. Raises :class:`InvalidRequest` naming the field."""
    choice = request.tool_choice
    if not request.tools:
        if choice not in (None, "none"):
            raise InvalidRequest("tool_choice needs tools", field="tool_choice")
        return None
    names = names_of(request.tools)
    if choice == "none":
        return None
    mode: Mode = "required" if choice == "required" else "auto"
    if isinstance(choice, ToolChoice):
        mode, names = _chosen(choice, names)
    one_only = request.parallel_tool_calls is False or mode == "named"
    return ToolUse(request.tools, list(names), mode, one_only)


def names_of(tools: Sequence[dict[str, Any]]) -> Collection[str]:
    """In their order. Raises :class:`InvalidRequest` for what is no tool."""
    found: dict[str, None] = {}
    for at, tool in enumerate(tools):
        name = _checked(tool, f"tools[{at}]").function.name
        if name in found:
            field = f"tools[{at}].function.name"
            raise InvalidRequest(f"{field}: {name!r} is there twice", field=field)
        found[name] = None
    return found.keys()


def _chosen(choice: ToolChoice, known: Collection[str]) -> tuple[Mode, Collection[str]]:
    mode: Mode
    if choice.type == "function" and choice.function is not None:
        mode, names = "named", [choice.function.name]
    elif choice.type == "allowed_tools" and choice.allowed_tools is not None:
        allowed = choice.allowed_tools
        mode, names = allowed.mode, list(dict.fromkeys(each.function.name for each in allowed.tools))
    else:
        raise InvalidRequest(f"tool_choice.{choice.type} is missing", field=f"tool_choice.{choice.type}")
    for name in names:
        if name not in known:
            raise InvalidRequest(f"tool_choice: {name!r} is none of the tools", field="tool_choice")
    return mode, names


def _checked(tool: dict[str, Any], where: str) -> Tool:
    try:
        return msgspec.convert(tool, Tool)
    except msgspec.ValidationError as error:
        path, message = located(error)
        field = f"{where}.{path}" if path else where
        raise InvalidRequest(f"{field}: {message}", field=field) from None
