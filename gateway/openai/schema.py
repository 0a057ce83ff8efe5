"""Request bodies of the OpenAI API (and vLLM's extras): every field, with its bounds, in one place.

Owns types: what they refuse is refused before anything is built, and ``/openapi.json`` is made of them. What
depends on the model (context, vocabulary) or on settings (``gateway.max_n``) is ``gateway/request/``'s.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from microserve.gateway.api.fields import (
    MAX_COUNTED_TOKENS,
    MAX_DESCRIPTION_CHARS,
    MAX_MESSAGES,
    MAX_NAME_CHARS,
    MAX_TOOLS,
    FunctionName,
    Ignored,
    Label,
    Name,
    OnlyFalse,
    OnlyTrue,
    RequestBody,
    StopString,
    StopStrings,
    Told,
    Unsupported,
    only,
)
from microserve.gateway.request.request import MAX_CHOICES, Role
from microserve.protocol.messages import sampling as bounds
from microserve.protocol.messages.attributes import MAX_PRIORITY
from microserve.protocol.messages.sampling import TokenId

MAX_TEMPLATE_OPTIONS = 64

ServiceTier = Annotated[str, Meta(max_length=MAX_NAME_CHARS, description="For strategies, too, as a label.")]
Documents = Annotated[list[dict[str, Any]], Meta(max_length=MAX_MESSAGES)]
TemplateOptions = Annotated[dict[Name, Any], Meta(max_length=MAX_TEMPLATE_OPTIONS)]
TokenIds = Annotated[list[TokenId], Meta(max_length=MAX_COUNTED_TOKENS)]
_KINDS = {"anyOf": [{"items": {"type": kind}} for kind in ("string", "integer", "array")]}
Prompt = (
    str
    | Annotated[
        list[str | TokenId | TokenIds],
        Meta(min_length=1, max_length=MAX_COUNTED_TOKENS, extra_json_schema=_KINDS),
    ]
)
"""Text, texts, ids or lists of ids; mixtures are refused."""


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    include_obfuscation: Ignored = None
    continuous_usage_stats: Told = None
    """vLLM's; usage comes with the last chunk."""


class JsonSchemaFormat(msgspec.Struct):
    name: Name | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    """Refuse what cannot be enforced exactly, where else a part of it is relaxed and told."""


class ResponseFormat(msgspec.Struct):
    type: Annotated[
        str,
        Meta(
            max_length=MAX_NAME_CHARS,
            extra_json_schema={"enum": ["text", "json_object", "json_schema", "structural_tag"]},
        ),
    ]
    json_schema: JsonSchemaFormat | None = None
    structures: list[Any] | None = None
    triggers: list[str] | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's: exactly one of these."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    """Lark or GBNF."""
    json_object: bool | None = None
    structural_tag: dict[str, Any] | str | None = None


class GenerationRequest(RequestBody, kw_only=True):
    """What both kinds of completion share. ``None`` is the default everywhere, as clients send ``null``."""

    off_by: ClassVar[dict[str, str]] = {"functions": "function_call"}

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: bounds.MaxTokens | None = None
    temperature: bounds.Temperature | None = None
    top_p: bounds.TopP | None = None
    stop: StopString | StopStrings | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    presence_penalty: bounds.Penalty | None = None
    frequency_penalty: bounds.Penalty | None = None
    logit_bias: bounds.LogitBias | None = None
    # vLLM's extras, sent by clients as ``extra_body``.
    top_k: Annotated[int, Meta(ge=-1, le=bounds.MAX_COUNT)] | None = None
    """-1 and 0 are both "off"."""
    min_p: bounds.MinP | None = None
    min_tokens: bounds.MinTokens | None = None
    repetition_penalty: bounds.RepetitionPenalty | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=bounds.MAX_STOP_TOKEN_IDS)] | None = None
    cache_salt: Name | None = None
    prompt_logprobs: bounds.Logprobs | None = None
    """Of the prompt's own tokens, and so many of the likeliest; not of a stream."""
    return_tokens_as_token_ids: bool | None = None
    # What the output may be (gateway/grammar/): one of these.
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    # Labels and hints: they change no token, so dropping them is honest.
    user: Label = None
    metadata: Label = None
    safety_identifier: Label = None
    prompt_cache_key: Label = None
    prompt_cache_retention: Ignored = None
    prompt_cache_options: Ignored = None
    service_tier: ServiceTier | None = None
    """``flex`` gives way by one step of priority and is answered as such, all others as ``default``."""
    prediction: Told = None
    store: (
        Annotated[bool, Meta(description="Nothing is stored, which is told where it was asked for.")] | None
    ) = None
    priority: Annotated[int, Meta(ge=0, le=2 * MAX_PRIORITY)] | None = None
    """As in vLLM, more is later: so much below its key's own, never above."""
    # How prompt and answer are text (vLLM's).
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    """The last so many tokens of a prompt; -1: as many as leave room for the output."""
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    """The stop string, or the text of the stop token, is a part of the answer."""
    # Known and not supported: refused by name, rather than dropped.
    audio: Unsupported = None
    web_search_options: Unsupported = None
    moderation: Unsupported = None
    reasoning: Unsupported = None
    prompt_embeds: Unsupported = None
    chat_template: Unsupported = None
    guided_whitespace_pattern: Unsupported = None
    logits_processors: Unsupported = None
    allowed_token_ids: Unsupported = None
    mm_processor_kwargs: Unsupported = None
    kv_transfer_params: Unsupported = None
    modalities: Annotated[Any, only(["text"])] = None
    suffix: Annotated[Any, only("")] = None
    use_beam_search: OnlyFalse = None
    length_penalty: Annotated[Any, only(1)] = None
    bad_words: Annotated[Any, only([])] = None
    return_token_ids: OnlyFalse = None
    include_reasoning: OnlyTrue = None
    functions: Annotated[Any, Meta(description="Refused unless empty, or function_call is none.")] = None
    function_call: Annotated[Any, only("none")] = None


class CompletionRequest(GenerationRequest, kw_only=True):
    off_by: ClassVar[dict[str, str]] = {"tools": "tool_choice", "functions": "function_call"}

    prompt: Prompt
    max_tokens: bounds.MaxTokensOrNone | None = None
    """0 with ``echo`` or ``prompt_logprobs`` only."""
    logprobs: bounds.Logprobs | None = None
    add_special_tokens: bool | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    """Not of a stream."""
    # Of conversations.
    parallel_tool_calls: Ignored = None
    add_generation_prompt: OnlyTrue = None
    continue_final_message: OnlyFalse = None
    documents: Unsupported = None
    verbosity: Unsupported = None
    reasoning_effort: Unsupported = None
    chat_template_kwargs: Annotated[Any, only({})] = None
    tools: Annotated[Any, Meta(description="Refused unless empty, or tool_choice is none.")] = None
    tool_choice: Annotated[Any, only("none")] = None


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


class ChatRequest(GenerationRequest):
    messages: Messages
    max_completion_tokens: bounds.MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: bounds.Logprobs | None = None
    echo: OnlyFalse = None
    best_of: Annotated[Any, only(1)] = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # For the model's chat template, and refused where it knows nothing of them.
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    """``medium`` is let through by all."""
    enable_thinking: bool | None = None
    documents: Documents | None = None
    chat_template_kwargs: TemplateOptions | None = None
    add_generation_prompt: bool | None = None
    """False: the prompt ends behind the last message."""
    continue_final_message: bool | None = None
    """The answer goes on with the last message; without ``add_generation_prompt``."""
    add_special_tokens: OnlyFalse = None


class TokenizeRequest(msgspec.Struct):
    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None
    """Instead of ``prompt``, with what the template takes beside them."""
    tools: Tools | None = None
    documents: Documents | None = None
    chat_template_kwargs: TemplateOptions | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    """Of ``prompt``; true if it is not said. Templates write their own."""
    return_token_strs: bool | None = None
    chat_template: Unsupported = None
    mm_processor_kwargs: Unsupported = None


class DetokenizeRequest(msgspec.Struct):
    tokens: TokenIds
    model: Name | None = None
