"""The table of APIs: what is known of them outside of their own rooms, by name.

Two import it: ``app.py``, which routes to them, and the helper's child, which reads large bodies.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from microserve.gateway.api.dialect import Dialect
from microserve.gateway.openai.chat import ChatFormat, chat_request
from microserve.gateway.openai.completions import CompletionFormat, completion_request
from microserve.gateway.openai.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from microserve.gateway.openai.tokens import detokenized, tokenized
from microserve.gateway.responses.asking import responses_request
from microserve.gateway.responses.format import ResponsesFormat
from microserve.gateway.responses.schema import ResponsesRequest
from microserve.gateway.text.tokenizer import ModelTokenizer

CHAT = Dialect("chat", ChatRequest, chat_request, ChatFormat, "messages")
COMPLETIONS = Dialect("completions", CompletionRequest, completion_request, CompletionFormat, "prompt")
RESPONSES = Dialect("responses", ResponsesRequest, responses_request, ResponsesFormat, "input")

DIALECTS: Mapping[str, Dialect[Any]] = {each.name: each for each in (CHAT, COMPLETIONS, RESPONSES)}


@dataclass(frozen=True, slots=True)
class Counting:
    """A question that no router is asked."""

    body: type[Any]
    """Has a field ``model``, which may be None."""
    reply: Callable[[Any, ModelTokenizer, int], Awaitable[bytes]]
    """Of a body, by the model's tokenizer, which takes so many tokens (0: not known)."""


COUNTINGS: Mapping[str, Counting] = {
    "tokenize": Counting(TokenizeRequest, tokenized),
    "detokenize": Counting(DetokenizeRequest, detokenized),
}
