"""A large body -> what is sent to a router, or the whole reply where no router is asked.

Owns the order of things in the helper; every step is the one that small bodies take in the gateway itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from microserve.gateway.grammar.asked import asked_of
from microserve.gateway.grammar.checker import check_asked
from microserve.gateway.helper.jobs import Answered, Prepare, Prepared, Result, Setup
from microserve.gateway.openai.attributes import FIELDS, METADATA
from microserve.gateway.openai.chat import chat_prompts
from microserve.gateway.openai.completions import completion_prompts
from microserve.gateway.openai.parse import Shape, parse
from microserve.gateway.openai.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    Message,
    TokenizeRequest,
)
from microserve.gateway.openai.tokens import detokenized, tokenized
from microserve.gateway.routers.link import ModelLimits
from microserve.gateway.text.tokenizer import Maps, ModelTokenizer
from microserve.protocol.bus.codec import encode_tokens
from microserve.protocol.errors import InternalError, InvalidRequest, ModelNotFound, NoEngines

LABELS = (*FIELDS, METADATA, "prompt_cache_retention")
MAX_LABEL_NBYTES = 64 << 10
MAX_REST_NBYTES = 1 << 20
"""Of a request without its prompt, as it goes back to the gateway: read there in some milliseconds."""

R = TypeVar("R", ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)


class Preparer:
    """One per process."""

    def __init__(
        self, setup: Setup, render: Callable[[Maps, Maps | None, Mapping[str, Any] | None], str]
    ) -> None:
        async def renderer(messages: Maps, tools: Maps | None, options: Mapping[str, Any] | None) -> str:
            return render(messages, tools, options)

        self._model = setup.model
        self._shape = Shape(setup.max_values, setup.max_depth)
        self._tokenizer = ModelTokenizer.load(
            setup.directory, renderer=renderer, parse_control_tokens=setup.parse_control_tokens
        )

    async def prepare(self, job: Prepare, body: bytes) -> tuple[Result, bytes]:
        """The answer and its bulk. Raises what a small body of the kind would."""
        match job.kind:
            case "chat":
                chat = self._parse(body, ChatRequest)
                prompts = await chat_prompts(chat, self._tokenizer, _limits(job))
                chat.messages = [Message(role="user", content="")]
                return _prepared(chat, prompts)
            case "completions":
                completion = self._parse(body, CompletionRequest)
                prompts = await completion_prompts(completion, self._tokenizer, _limits(job))
                completion.prompt = ""
                return _prepared(completion, prompts)
            case "tokenize":
                asked = self._parse(body, TokenizeRequest)
                return Answered(), await tokenized(asked, self._tokenizer, job.max_model_len)
            case "detokenize":
                return Answered(), detokenized(self._parse(body, DetokenizeRequest), self._tokenizer)
        raise InternalError(f"no job is called {job.kind!r}")

    def _parse(self, body: bytes, kind: type[R]) -> R:
        request = parse(body, kind, self._shape)
        if request.model not in (None, self._model):
            raise ModelNotFound(f"the model {request.model!r} is not served here", field="model")
        return request


def _limits(job: Prepare) -> ModelLimits:
    limits = ModelLimits(job.max_model_len, job.vocab_size)
    if not limits.are_known:
        raise NoEngines("no engine has told the limits of the model yet")
    return limits


def _prepared(request: GenerationRequest, prompts: Sequence[Sequence[int]]) -> tuple[Result, bytes]:
    if (asked := asked_of(request)) is not None:
        check_asked(asked)  # before it is anybody's work to look at a text of any size
    for name in LABELS:  # may be as large as the body, which no attribute is
        value = getattr(request, name)
        if value is not None and len(msgspec.json.encode(value)) > MAX_LABEL_NBYTES:
            setattr(request, name, None)
    rest = msgspec.json.encode(request)
    if len(rest) > MAX_REST_NBYTES:  # the gateway reads it in its loop
        raise InvalidRequest(
            f"beside {request.prompt_field} a request may have {MAX_REST_NBYTES} bytes at most, this one has "
            f"{len(rest)}"
        )
    bulk = b"".join(map(encode_tokens, prompts))
    return Prepared(rest, list(map(len, prompts))), bulk
