"""Messages and tools as OpenAI's conversations have them, with their bounds.

Owns types. Which roles, parts and tools fit each other is ``chat.py``'s and ``tools.py``'s.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from microserve.gateway.api.fields import (
    MAX_DESCRIPTION_CHARS,
    MAX_MESSAGES,
    MAX_NAME_CHARS,
    MAX_TOOLS,
    FunctionName,
    Ignored,
    Name,
)
from microserve.gateway.request.request import Role


class ContentPart(msgspec.Struct):
    type: Annotated[str, Meta(max_length=MAX_NAME_CHARS, extra_json_schema={"enum": ["text"]})]
    text: str | None = None


ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
"""Whom templates know; ``developer`` is OpenAI's newer name for ``system``."""


class FunctionDefinition(msgspec.Struct):
    name: FunctionName
    description: Annotated[str, Meta(max_length=MAX_DESCRIPTION_CHARS)] | None = None
    parameters: dict[str, Any] | None = None
    """JSON Schema of its arguments, an object."""
    strict: bool | None = None


class Tool(msgspec.Struct):
    type: Literal["function"]
    function: FunctionDefinition


_TOOL = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "pattern": "^[A-Za-z0-9_.\\-]{1,128}$"},
                "description": {"type": ["string", "null"], "maxLength": MAX_DESCRIPTION_CHARS},
                "parameters": {"type": ["object", "null"]},
                "strict": {"type": ["boolean", "null"]},
            },
        },
    },
}
Tools = Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS, extra_json_schema={"items": _TOOL})]
"""As the client wrote them, for that is what a template shows; each is a :class:`Tool` (``tools.py``)."""


class NamedFunction(msgspec.Struct):
    name: FunctionName


class NamedTool(msgspec.Struct):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(msgspec.Struct):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Meta(min_length=1, max_length=MAX_TOOLS)]


class ToolChoice(msgspec.Struct):
    """One of both, as ``type`` says."""

    type: Literal["function", "allowed_tools"]
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


class CalledFunction(msgspec.Struct):
    name: FunctionName
    arguments: str
    """JSON of an object."""


class ToolCall(msgspec.Struct):
    id: Name
    function: CalledFunction
    type: Literal["function"] = "function"


class Message(msgspec.Struct):
    role: Annotated[str, Meta(max_length=MAX_NAME_CHARS, extra_json_schema={"enum": sorted(ROLES)})]
    content: str | list[ContentPart] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=MAX_TOOLS)] | None = None
    """Of the assistant."""
    tool_call_id: Name | None = None
    """Of a tool: the call that this is the result of."""
    reasoning_content: str | None = None
    """What the assistant thought; ``reasoning`` is another name for it."""
    reasoning: str | None = None
    # Of answers that go back as they came.
    refusal: str | None = None
    annotations: Ignored = None
    audio: None = None
    function_call: None = None


Messages = Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
