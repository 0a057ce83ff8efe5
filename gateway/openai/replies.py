"""The shape of answers, for ``/openapi.json`` and whoever checks answers against it.

Owns types that nothing is built from (a chunk is put together from bytes, ``answer.py``): a test holds every
kind of answer against them.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from microserve.gateway.openai.messages import ToolCall


class Error(msgspec.Struct):
    message: str
    type: str
    param: str | None
    """The field that is wrong, as the client wrote it."""
    code: str


class ErrorEnvelope(msgspec.Struct):
    error: Error


class CachedTokens(msgspec.Struct):
    cached_tokens: int


class CompletionDetails(msgspec.Struct):
    reasoning_tokens: int


class UsageReply(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: CompletionDetails | UnsetType = UNSET
    """Of a model whose thoughts, or calls, are looked for."""


class TokenEntry(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None = None


class ChatLogprob(TokenEntry):
    top_logprobs: list[TokenEntry] = []


class ChatLogprobs(msgspec.Struct):
    content: list[ChatLogprob]
    refusal: None = None


class AssistantMessage(msgspec.Struct):
    role: Literal["assistant"]
    content: str | None
    """null: there are calls and no text."""
    refusal: None = None
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class RankedLogprob(msgspec.Struct):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, RankedLogprob] | None]
"""vLLM's: of each token of the prompt, by id; null of the first."""


class ChatReply(msgspec.Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageReply
    service_tier: Literal["default", "flex"] | UnsetType = UNSET
    """Where the request has asked for one."""
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    """Where they are asked for."""


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    """null: of an echoed prompt's first token."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    """Where they are asked for."""


class CompletionReply(msgspec.Struct):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageReply


class Capabilities(msgspec.Struct):
    """What a request may ask for without being refused."""

    chat: bool
    completions: bool
    tools: bool
    required_tools: bool
    """Calls may be required, named or strict."""
    reasoning: bool
    """Thoughts are told apart from the answer."""
    reasoning_options: list[str]
    """Fields that the chat template looks at."""
    structured_output: bool
    logprobs: bool


class ModelCard(msgspec.Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int | None
    context_length: int | None
    """As ``max_model_len``; null while no engine has told it."""
    input_modalities: list[str]
    output_modalities: list[str]
    dtype: str
    quantization: str | None
    capabilities: Capabilities


class ModelList(msgspec.Struct):
    object: Literal["list"]
    data: list[ModelCard]


class TokenizeReply(msgspec.Struct):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None
    """As the vocabulary has them, where they were asked for."""


class TokenizerInfoReply(msgspec.Struct):
    """The special tokens are those that the model has."""

    tokenizer_class: str
    chat_template: str | None
    model_max_length: int | None
    bos_token: str | UnsetType = UNSET
    eos_token: str | UnsetType = UNSET
    pad_token: str | UnsetType = UNSET
    unk_token: str | UnsetType = UNSET


class DetokenizeReply(msgspec.Struct):
    prompt: str


class VersionReply(msgspec.Struct):
    version: str


class ServerInfoReply(msgspec.Struct):
    """As SGLang has it, for its router."""

    model_path: str
    """The name that clients use."""
    served_model_name: str
    version: str
    max_total_num_tokens: int
    """Of one request: the model's context."""
    max_running_requests: int
    tp_size: int = 1
    dp_size: int = 1


class ModelInfoReply(msgspec.Struct):
    """As SGLang has it, for its router."""

    model_path: str
    tokenizer_path: str
    is_generation: bool = True


class RouterStatus(msgspec.Struct):
    address: str
    alive: bool
    model: str


class ReadyReply(msgspec.Struct):
    ready: bool
    draining: bool
    routers: list[RouterStatus]
    version: str
    time: float
    """Seconds since 1970, by the gateway's clock."""
