"""The shape of answers, for ``/openapi.json`` and whoever checks answers against it.

Owns types that nothing is built from (a chunk is put together from bytes, ``answer.py``): a test holds every
kind of answer against them.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from microserve.gateway.openai.schema import ToolCall


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


class ChatReply(msgspec.Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageReply


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionReply(msgspec.Struct):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageReply


class ModelCard(msgspec.Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None


class ModelList(msgspec.Struct):
    object: Literal["list"]
    data: list[ModelCard]


class TokenizeReply(msgspec.Struct):
    count: int
    max_model_len: int | None
    tokens: list[int]


class DetokenizeReply(msgspec.Struct):
    prompt: str


class VersionReply(msgspec.Struct):
    version: str


class RouterStatus(msgspec.Struct):
    address: str
    alive: bool
    model: str


class ReadyReply(msgspec.Struct):
    ready: bool
    draining: bool
    routers: list[RouterStatus]
