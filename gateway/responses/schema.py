"""Bodies of ``/v1/responses``: every field, with its bounds, in one place.

Owns types: what they refuse is refused before anything is built, and ``/openapi.json`` is made of them. What
an item may be depends on its ``type``, and is said by ``items.py``.
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
    Label,
    Name,
    OnlyFalse,
    RequestBody,
    StopString,
    StopStrings,
    Unsupported,
    only,
)
from microserve.protocol.messages.request import sampling as bounds

MAX_METADATA = 16
ItemType = Annotated[
    str,
    Meta(
        max_length=MAX_NAME_CHARS,
        extra_json_schema={
            "enum": ["message", "function_call", "function_call_output", "reasoning", "item_reference"]
        },
    ),
]
PartType = Annotated[
    str,
    Meta(
        max_length=MAX_NAME_CHARS,
        extra_json_schema={
            "enum": ["input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text"]
        },
    ),
]


class ItemPart(msgspec.Struct, omit_defaults=True):
    """Of a content; what else an answer's parts have is not looked at."""

    type: PartType
    text: str | None = None
    refusal: str | None = None
    annotations: Ignored = None
    logprobs: Ignored = None
    parsed: Ignored = None


Content = str | Annotated[list[ItemPart], Meta(max_length=MAX_MESSAGES)]


class InputItem(msgspec.Struct, omit_defaults=True):
    """One of several kinds, as ``type`` says; a message may leave that out. Answers' items are items, too."""

    type: ItemType | None = None
    id: Name | None = None
    role: Annotated[str, Meta(max_length=MAX_NAME_CHARS)] | None = None
    content: Content | None = None
    """Of a message; of a reasoning item, the thought."""
    summary: Annotated[list[ItemPart], Meta(max_length=MAX_MESSAGES)] | None = None
    encrypted_content: str | None = None
    """Of a reasoning item, as an answer had it."""
    call_id: Name | None = None
    name: FunctionName | None = None
    arguments: str | None = None
    """JSON of an object."""
    output: Content | None = None
    # What else an answer's items have, and openai's own classes.
    status: Ignored = None
    phase: Ignored = None
    parsed_arguments: Ignored = None


Items = Annotated[list[InputItem], Meta(max_length=MAX_MESSAGES)]


class TextFormat(msgspec.Struct, omit_defaults=True):
    type: Annotated[
        str,
        Meta(
            max_length=MAX_NAME_CHARS,
            extra_json_schema={"enum": ["text", "json_object", "json_schema"]},
        ),
    ]
    name: Name | None = None
    description: Annotated[str, Meta(max_length=MAX_DESCRIPTION_CHARS)] | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    """Refuse what cannot be enforced exactly, where else a part of it is relaxed and told."""


class TextConfig(msgspec.Struct, omit_defaults=True):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    """Other than ``medium``: for templates that look at ``verbosity``."""


class Reasoning(msgspec.Struct, omit_defaults=True):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Annotated[Any, only("auto")] = None
    """Thoughts are shown as they are; nothing makes a summary of them."""
    generate_summary: Annotated[Any, only("auto")] = None
    context: Annotated[Any, only("auto", "all_turns")] = None
    mode: Annotated[Any, only("standard")] = None


class FunctionTool(msgspec.Struct, omit_defaults=True):
    type: Literal["function"]
    name: FunctionName
    description: Annotated[str, Meta(max_length=MAX_DESCRIPTION_CHARS)] | None = None
    parameters: dict[str, Any] | None = None
    """JSON Schema of its arguments, an object."""
    strict: bool | None = None
    output_schema: Ignored = None
    defer_loading: OnlyFalse = None
    allowed_callers: Annotated[Any, only(["direct"])] = None


class ListedFunction(msgspec.Struct):
    type: Literal["function"]
    name: FunctionName


class FunctionChoice(msgspec.Struct, omit_defaults=True):
    """A function to call, or ``allowed_tools`` with a mode."""

    type: Literal["function", "allowed_tools"]
    name: FunctionName | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[ListedFunction], Meta(min_length=1, max_length=MAX_TOOLS)] | None = None


class ResponsesStreamOptions(msgspec.Struct):
    include_obfuscation: Annotated[Any, only(False)] = None


Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    # Of tools that nobody calls here: there is nothing to be included.
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
    Meta(max_length=MAX_METADATA),
]


class ResponsesRequest(RequestBody, kw_only=True):
    """``None`` is the default everywhere, as clients send ``null``."""

    input: str | Items | None = None
    instructions: str | None = None
    previous_response_id: Name | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    max_output_tokens: bounds.MaxTokens | None = None
    temperature: bounds.Temperature | None = None
    top_p: bounds.TopP | None = None
    top_logprobs: bounds.Logprobs | None = None
    include: Annotated[list[Include], Meta(max_length=16)] | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Annotated[int, Meta(ge=1, le=bounds.MAX_COUNT)] | None = None
    """Of tools that a server calls: here there are none."""
    metadata: Metadata | None = None
    # More numbers, as vLLM and Open Responses take them.
    presence_penalty: bounds.Penalty | None = None
    frequency_penalty: bounds.Penalty | None = None
    repetition_penalty: bounds.RepetitionPenalty | None = None
    top_k: Annotated[int, Meta(ge=-1, le=bounds.MAX_COUNT)] | None = None
    min_p: bounds.MinP | None = None
    min_tokens: bounds.MinTokens | None = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: StopString | StopStrings | None = None
    cache_salt: Name | None = None
    # Labels and hints: they change no token, so dropping them is honest.
    user: Label = None
    safety_identifier: Label = None
    prompt_cache_key: Label = None
    service_tier: Label = None
    prompt_cache_retention: Ignored = None
    # Known and not supported: refused by name, rather than dropped.
    truncation: Annotated[Any, only("disabled")] = None
    background: OnlyFalse = None
    conversation: Unsupported = None
    prompt: Unsupported = None
    context_management: Annotated[Any, only([])] = None
    moderation: Unsupported = None
    prompt_cache_options: Unsupported = None
    background_options: Unsupported = None
    access_programs: Unsupported = None
    image: Unsupported = None
