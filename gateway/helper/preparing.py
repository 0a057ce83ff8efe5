"""A large body -> what is sent to a router, or the whole reply where no router is asked.

Owns the order of things in the helper; every step is the one that small bodies take in the gateway itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from microserve.gateway.grammar.asked import asked_of
from microserve.gateway.grammar.checker import check_asked
from microserve.gateway.helper.jobs import Answered, Prepare, Prepared, Result, Setup, encode
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
from microserve.protocol.errors import InternalError, ModelNotFound, NoEngines

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
    request.user = request.metadata = None  # may be as large as the body, and nobody reads them
    bulk = b"".join(map(encode_tokens, prompts))
    return Prepared(encode(request), list(map(len, prompts))), bulk
