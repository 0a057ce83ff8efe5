"""What a body says of tools, in this API's own form: a function's members stand beside its ``type``."""

from __future__ import annotations

from typing import Any

from microserve.gateway.api.parse import check_supported
from microserve.gateway.request.request import Mode, ToolUse
from microserve.gateway.responses.schema import FunctionChoice, FunctionTool, ResponsesRequest
from microserve.protocol.errors import InvalidRequest


def tool_use_of(body: ResponsesRequest) -> ToolUse | None:
    """None without tools, or if none may be called. Raises :class:`InvalidRequest` naming the field."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice needs tools", field="tool_choice")
        return None
    names: dict[str, None] = {}
    for at, tool in enumerate(body.tools):
        check_supported(tool, f"tools[{at}].")
        if tool.name in names:
            field = f"tools[{at}].name"
            raise InvalidRequest(f"{field}: {tool.name!r} is there twice", field=field)
        names[tool.name] = None
    if choice == "none":
        return None
    mode: Mode = "required" if choice == "required" else "auto"
    callable_names = list(names)
    if isinstance(choice, FunctionChoice):
        mode, callable_names = _chosen(choice)
        for name in callable_names:
            if name not in names:
                raise InvalidRequest(f"tool_choice: {name!r} is none of the tools", field="tool_choice")
    one_only = body.parallel_tool_calls is False or mode == "named"
    return ToolUse(list(map(shown, body.tools)), callable_names, mode, one_only, "parameters")


def shown(tool: FunctionTool) -> dict[str, Any]:
    """As templates expect it."""
    members = {name: getattr(tool, name) for name in ("name", "description", "parameters", "strict")}
    function = {name: value for name, value in members.items() if value is not None}
    return {"type": "function", "function": function}


def _chosen(choice: FunctionChoice) -> tuple[Mode, list[str]]:
    if choice.type == "function":
        if choice.name is None:
            raise InvalidRequest("tool_choice.name is missing", field="tool_choice.name")
        return "named", [choice.name]
    for member in ("mode", "tools"):
        if getattr(choice, member) is None:
            raise InvalidRequest(f"tool_choice.{member} is missing", field=f"tool_choice.{member}")
    assert choice.mode is not None and choice.tools is not None
    return choice.mode, list(dict.fromkeys(each.name for each in choice.tools))
