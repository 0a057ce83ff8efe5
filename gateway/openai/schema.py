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
    MAX_MESSAGES,
    MAX_NAME_CHARS,
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
from microserve.gateway.openai.messages import Messages, ToolChoice, Tools
from microserve.gateway.request.request import MAX_CHOICES
from microserve.protocol.messages.request import sampling as bounds
from microserve.protocol.messages.request.attributes import MAX_PRIORITY
from microserve.protocol.messages.request.sampling import TokenId

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
    """Needs ``stream``."""
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    """At most ``gateway.max_n``."""
    max_tokens: bounds.MaxTokens | None = None
    """Of a conversation as many as fit, or as the model's defaults say."""
    temperature: bounds.Temperature | None = None
    """OpenAI's ends at 2."""
    top_p: bounds.TopP | None = None
    stop: StopString | StopStrings | None = None
    """OpenAI takes 4."""
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    """The same tokens for the same request, within one exact numerics class; OpenAI does not promise it."""
    presence_penalty: bounds.Penalty | None = None
    frequency_penalty: bounds.Penalty | None = None
    logit_bias: bounds.LogitBias | None = None
    """-100 to 100 by token id."""
    # vLLM's extras, sent by clients as ``extra_body``.
    top_k: Annotated[int, Meta(ge=-1, le=bounds.MAX_COUNT)] | None = None
    """-1 and 0 are both "off"."""
    min_p: bounds.MinP | None = None
    min_tokens: bounds.MinTokens | None = None
    repetition_penalty: bounds.RepetitionPenalty | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=bounds.MAX_STOP_TOKEN_IDS)] | None = None
    cache_salt: Name | None = None
    """Only requests of the same salt share a prefix cache."""
    prompt_logprobs: bounds.Logprobs | None = None
    """Of the prompt's own tokens, and so many of the likeliest; not of a stream."""
    return_tokens_as_token_ids: bool | None = None
    # What the output may be (gateway/grammar/): one of these.
    response_format: ResponseFormat | None = None
    """With ``tools`` a kind of JSON only: the answer is that, or calls."""
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
    store: bool | None = None
    """Nothing is stored, which is told where it was asked for."""
    priority: Annotated[int, Meta(ge=0, le=2 * MAX_PRIORITY)] | None = None
    """As in vLLM, more is later: so much below its key's own, never above."""
    # How prompt and answer are text (vLLM's).
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    """The last so many tokens of a prompt; -1: as many as leave room for the output."""
    skip_special_tokens: bool | None = None
    """False: special tokens are shown, but the one that was the end."""
    spaces_between_special_tokens: bool | None = None
    """Of decoders that join tokens with spaces."""
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
    """Text, texts, ids or lists of ids; mixtures are refused."""
    max_tokens: bounds.MaxTokensOrNone | None = None
    """16 unless it is said; 0 with ``echo`` or ``prompt_logprobs`` only."""
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


class ChatRequest(GenerationRequest):
    messages: Messages
    max_completion_tokens: bounds.MaxTokens | None = None
    """Goes before ``max_tokens``."""
    logprobs: bool | None = None
    top_logprobs: bounds.Logprobs | None = None
    """Needs ``logprobs``."""
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
