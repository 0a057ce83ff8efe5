"""The shape of answers, for ``/openapi.json`` and whoever checks answers against it.

Owns types that nothing is built from (``answer.py`` writes bytes): a test holds every kind of answer against
them.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType


class MessagesError(msgspec.Struct):
    type: str
    message: str
    param: str | None
    """The field that is wrong, as the client wrote it."""
    code: str


class MessagesErrorEnvelope(msgspec.Struct):
    type: Literal["error"]
    error: MessagesError


class TextReply(msgspec.Struct, tag_field="type", tag="text"):
    text: str


class ThinkingReply(msgspec.Struct, tag_field="type", tag="thinking"):
    thinking: str
    signature: str


class ToolUseReply(msgspec.Struct, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


class ThinkingTokens(msgspec.Struct):
    thinking_tokens: int


class MessageUsage(msgspec.Struct):
    input_tokens: int
    """Without those that came out of a prefix cache."""
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens | UnsetType = UNSET
    """Of a model whose thoughts, or calls, are looked for."""


class MessageReply(msgspec.Struct):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextReply | ThinkingReply | ToolUseReply]
    stop_reason: Literal[
        "end_turn", "tool_use", "stop_sequence", "max_tokens", "model_context_window_exceeded"
    ]
    stop_sequence: str | None
    usage: MessageUsage


class CountReply(msgspec.Struct):
    input_tokens: int
