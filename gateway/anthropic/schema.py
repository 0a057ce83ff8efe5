"""Request bodies of Anthropic's Messages API: every field, with its bounds, in one place.

Owns types: what they refuse is refused before anything is built, and ``/openapi.json`` is made of them. What
two fields say together is in ``conversation.py``, ``tools.py`` and ``request.py``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from microserve.gateway.api.fields import (
    MAX_DESCRIPTION_CHARS,
    MAX_MESSAGES,
    MAX_TOOLS,
    FunctionName,
    Ignored,
    Label,
    Name,
    RequestBody,
    StopStrings,
    Unsupported,
    only,
)
from microserve.protocol.messages.request import sampling as bounds

MAX_BLOCKS = 4096
"""Of one message."""
MIN_THINKING_TOKENS = 1024


# --- what a conversation is made of ------------------------------------------------------------------


class _Block(msgspec.Struct, kw_only=True):
    cache_control: Ignored = None
    """Prefixes are cached without being asked."""


class TextBlock(_Block, tag_field="type", tag="text"):
    text: str
    citations: Ignored = None


class ThinkingBlock(_Block, tag_field="type", tag="thinking"):
    """What the assistant thought in an earlier turn; its signature is not looked at."""

    thinking: str
    signature: str = ""


class RedactedThinkingBlock(_Block, tag_field="type", tag="redacted_thinking"):
    """Of another server, which alone can read it: left out."""

    data: str = ""


class ToolUseBlock(_Block, tag_field="type", tag="tool_use"):
    """A call that the assistant has made."""

    id: Name
    name: FunctionName
    input: dict[str, Any]
    caller: Ignored = None


class ToolResultBlock(_Block, tag_field="type", tag="tool_result"):
    """What came of a call."""

    tool_use_id: Name
    content: str | Annotated[list[TextBlock], Meta(max_length=MAX_BLOCKS)] | None = None
    is_error: bool | None = None


Block = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock


class InputMessage(msgspec.Struct):
    role: Literal["user", "assistant", "system"]
    """``system``: instructions in the midst of a conversation, which stay where they are."""
    content: str | Annotated[list[Block], Meta(max_length=MAX_BLOCKS)]


# --- what it may call, and how it thinks --------------------------------------------------------------


class ClientTool(msgspec.Struct):
    """A tool of the client's. Anthropic's own, which run on its servers or have its schema, are refused."""

    name: FunctionName
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    description: Annotated[str, Meta(max_length=MAX_DESCRIPTION_CHARS)] | None = None
    strict: bool | None = None
    eager_input_streaming: Ignored = None
    cache_control: Ignored = None
    defer_loading: Annotated[Any, only(False)] = None
    input_examples: Annotated[Any, only([])] = None
    allowed_callers: Annotated[Any, only(["direct"])] = None


class AutoChoice(msgspec.Struct, tag_field="type", tag="auto"):
    disable_parallel_tool_use: bool | None = None


class AnyChoice(msgspec.Struct, tag_field="type", tag="any"):
    """Some tool must be called."""

    disable_parallel_tool_use: bool | None = None


class NamedChoice(msgspec.Struct, tag_field="type", tag="tool"):
    """This tool must be called, once."""

    name: FunctionName
    disable_parallel_tool_use: bool | None = None


class NoChoice(msgspec.Struct, tag_field="type", tag="none"):
    """No tool is shown."""


Display = Literal["summarized", "omitted"]


class ThinkingEnabled(msgspec.Struct, tag_field="type", tag="enabled"):
    budget_tokens: Annotated[int, Meta(ge=MIN_THINKING_TOKENS, le=bounds.MAX_COUNT)]
    """Not enforced, which ``x-microserve-warning`` says."""
    display: Display | None = None


class ThinkingAdaptive(msgspec.Struct, tag_field="type", tag="adaptive"):
    display: Display | None = None


class ThinkingDisabled(msgspec.Struct, tag_field="type", tag="disabled"):
    pass


class JsonFormat(msgspec.Struct):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, forbid_unknown_fields=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """For the chat template, where it looks at ``reasoning_effort``."""
    format: JsonFormat | None = None


_NO_EDITS: tuple[dict[str, Any], ...] = (
    {},
    {"edits": []},
    {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
)
"""What agents send where nothing is to be edited."""


class CountTokensRequest(RequestBody, kw_only=True):
    """What both endpoints share. ``None`` is the default everywhere, as clients send ``null``."""

    messages: Annotated[list[InputMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    system: str | Annotated[list[TextBlock], Meta(max_length=MAX_BLOCKS)] | None = None
    tools: Annotated[list[ClientTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: AutoChoice | AnyChoice | NamedChoice | NoChoice | None = None
    thinking: ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = None
    """An older place of ``output_config.format``."""
    cache_control: Ignored = None
    user_profile_id: Ignored = None
    # Known and not supported: refused by name, rather than dropped.
    container: Unsupported = None
    mcp_servers: Annotated[Any, only([])] = None
    context_management: Annotated[Any, only(*_NO_EDITS)] = None
    compaction: Unsupported = None
    diagnostics: Unsupported = None
    fallbacks: Annotated[Any, only([])] = None
    thread: Unsupported = None
    inference_geo: Unsupported = None
    speed: Annotated[Any, only("standard")] = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    max_tokens: bounds.MaxTokens
    stream: bool | None = None
    stop_sequences: StopStrings | None = None
    temperature: bounds.Temperature | None = None
    """Anthropic's ends at 1."""
    top_p: bounds.TopP | None = None
    top_k: bounds.TopK | None = None
    # Labels: they change no token, so dropping them is honest.
    metadata: Label = None
    """Of it, ``user_id`` is whom strategies know as ``user``."""
    service_tier: Label = None
