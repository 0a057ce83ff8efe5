"""What a request says of tools: which the model may call, whether it must, and how many at once.

Owns ``tools``, ``tool_choice`` and ``parallel_tool_calls`` together, and the tools' types. Knows no model's
way of writing a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from microserve.gateway.openai.schema import ChatRequest, FunctionDefinition, Tool, ToolChoice
from microserve.protocol.errors import InvalidRequest, located

Mode = Literal["auto", "required", "named"]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Tools that an answer may call; a request without any has none of these."""

    shown: Sequence[dict[str, Any]]
    """As the client wrote them."""
    callable: dict[str, FunctionDefinition]
    """By name; fewer than are shown where ``allowed_tools`` says so."""
    mode: Mode
    one_only: bool
    """At most one call (``parallel_tool_calls`` is false, or the function is named)."""

    @property
    def must_match(self) -> bool:
        """Does the client ask for what only a grammar can promise?"""
        return self.mode != "auto" or any(each.strict for each in self.callable.values())


def tool_use_of(request: ChatRequest) -> ToolUse | None:
    """None without tools, or if none may be called. Raises :class:`InvalidRequest` naming the field."""
    choice = request.tool_choice
    if not request.tools:
        if choice not in (None, "none"):
            raise InvalidRequest("tool_choice needs tools", field="tool_choice")
        return None
    found = functions_of(request.tools)
    if choice == "none":
        return None
    mode: Mode = "required" if choice == "required" else "auto"
    if isinstance(choice, ToolChoice):
        mode, names = _chosen(choice)
        for name in names:
            if name not in found:
                raise InvalidRequest(f"tool_choice: {name!r} is none of the tools", field="tool_choice")
        found = {name: found[name] for name in names}
    return ToolUse(request.tools, found, mode, request.parallel_tool_calls is False or mode == "named")


def functions_of(tools: Sequence[dict[str, Any]]) -> dict[str, FunctionDefinition]:
    """By name. Raises :class:`InvalidRequest` for what is no tool."""
    found: dict[str, FunctionDefinition] = {}
    for at, tool in enumerate(tools):
        function = _checked(tool, f"tools[{at}]").function
        if function.name in found:
            field = f"tools[{at}].function.name"
            raise InvalidRequest(f"{field}: {function.name!r} is there twice", field=field)
        found[function.name] = function
    return found


def _chosen(choice: ToolChoice) -> tuple[Mode, list[str]]:
    if choice.type == "function" and choice.function is not None:
        return "named", [choice.function.name]
    if choice.type == "allowed_tools" and choice.allowed_tools is not None:
        allowed = choice.allowed_tools
        return allowed.mode, list(dict.fromkeys(each.function.name for each in allowed.tools))
    raise InvalidRequest(f"tool_choice.{choice.type} is missing", field=f"tool_choice.{choice.type}")


def _checked(tool: dict[str, Any], where: str) -> Tool:
    try:
        return msgspec.convert(tool, Tool)
    except msgspec.ValidationError as error:
        path, message = located(error)
        field = f"{where}.{path}" if path else where
        raise InvalidRequest(f"{field}: {message}", field=field) from None
