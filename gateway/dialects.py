"""The table of APIs: what is known of them outside of their own rooms, by name.

Two import it: ``app.py``, which routes to them, and the helper's child, which reads large bodies.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from microserve.gateway.anthropic.answer import MessageFormat
from microserve.gateway.anthropic.counting import counted
from microserve.gateway.anthropic.errors import messages_problem_of
from microserve.gateway.anthropic.request import into_request
from microserve.gateway.anthropic.schema import CountTokensRequest, MessagesRequest
from microserve.gateway.api.dialect import Dialect, Recall
from microserve.gateway.http.errors import Problem, problem_of
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
from microserve.gateway.responses.keeping import names_of
from microserve.gateway.responses.schema import ResponsesRequest
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.protocol.errors import MeshError

CHAT = Dialect("chat", ChatRequest, chat_request, ChatFormat, "messages")
COMPLETIONS = Dialect("completions", CompletionRequest, completion_request, CompletionFormat, "prompt")
RESPONSES = Dialect(
    *("responses", ResponsesRequest, responses_request, ResponsesFormat, "input"),
    recall=Recall(names_of, responses_request),
)
MESSAGES = Dialect("messages", MessagesRequest, into_request, MessageFormat, "messages")

DIALECTS: Mapping[str, Dialect[Any]] = {each.name: each for each in (CHAT, COMPLETIONS, RESPONSES, MESSAGES)}


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
    "count_tokens": Counting(CountTokensRequest, counted),
}


@dataclass(frozen=True, slots=True)
class Manners:
    """What is said alike on all paths of an API, whoever answers."""

    problem_of: Callable[[MeshError], Problem] = problem_of
    """How an error looks."""
    id_headers: tuple[bytes, ...] = (b"x-request-id",)
    """Which headers have the request's id."""


OPENAI = Manners()
ANTHROPIC = Manners(messages_problem_of, (b"x-request-id", b"request-id"))


def manners_of(path: str) -> Manners:
    """Of whose path it is, also where there is nothing."""
    return ANTHROPIC if f"{path}/".startswith("/v1/messages/") else OPENAI
