"""What a request says of tools: which the model may call, whether it must, and how many at once.

Owns ``tools`` and ``tool_choice`` together. Knows no model's way of writing a call.
"""

from __future__ import annotations

from typing import Any

from microserve.gateway.anthropic.schema import (
    AnyChoice,
    AutoChoice,
    ClientTool,
    CountTokensRequest,
    NamedChoice,
    NoChoice,
)
from microserve.gateway.api.parse import check_supported
from microserve.gateway.request.request import ToolUse
from microserve.protocol.errors import InvalidRequest


def tool_use_of(body: CountTokensRequest) -> ToolUse | None:
    """None without tools, or if none may be called. Raises :class:`InvalidRequest` naming the field."""
    choice = body.tool_choice
    if not body.tools:
        if isinstance(choice, AnyChoice | NamedChoice):
            raise InvalidRequest("tool_choice needs tools", field="tool_choice")
        return None
    shown = [_shown(tool, f"tools[{at}]") for at, tool in enumerate(body.tools)]
    names = [tool.name for tool in body.tools]
    for at, name in enumerate(names):
        if name in names[:at]:
            raise InvalidRequest(f"tools[{at}].name: {name!r} is there twice", field=f"tools[{at}].name")
    match choice:
        case NoChoice():
            return None
        case NamedChoice(name=name):
            if name not in names:
                raise InvalidRequest(f"tool_choice: {name!r} is none of the tools", field="tool_choice")
            return _use(shown, [name], "named", one_only=True)
        case AnyChoice(disable_parallel_tool_use=one_only):
            return _use(shown, names, "required", one_only=bool(one_only))
        case AutoChoice(disable_parallel_tool_use=one_only):
            return _use(shown, names, "auto", one_only=bool(one_only))
    return _use(shown, names, "auto", one_only=False)


def _use(shown: list[dict[str, Any]], names: list[str], mode: Any, *, one_only: bool) -> ToolUse:
    return ToolUse(shown=shown, callable=names, mode=mode, one_only=one_only, schema_field="input_schema")


def _shown(tool: ClientTool, where: str) -> dict[str, Any]:
    """As chat templates know tools, which is as OpenAI writes them."""
    check_supported(tool, f"{where}.")
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.input_schema
    if tool.strict:
        function["strict"] = True
    return {"type": "function", "function": function}
