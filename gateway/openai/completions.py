"""``/v1/completions``: prompts in, their continuation out."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from microserve.gateway.api.format import Ending, FinishedChoice
from microserve.gateway.openai.answer import OpenAIFormat, encode
from microserve.gateway.openai.common import options_of, wish_of
from microserve.gateway.openai.grammar import asked_of
from microserve.gateway.openai.schema import CompletionRequest
from microserve.gateway.request.request import MAX_CHOICES, GenerateRequest, Ids, Texts
from microserve.gateway.text.choice import Piece
from microserve.gateway.text.transcript import TokenText
from microserve.protocol.errors import InvalidRequest

DEFAULT_MAX_TOKENS = 16


def completion_request(body: CompletionRequest) -> GenerateRequest:
    """Raises :class:`InvalidRequest` naming the field."""
    return GenerateRequest(
        prompt=_prompts(body.prompt, body.add_special_tokens is not False),
        sampling=wish_of(
            body,
            max_tokens=body.max_tokens,
            logprobs=body.logprobs,
            default_max_tokens=DEFAULT_MAX_TOKENS,
        ),
        grammar=asked_of(body),
        **options_of(body),
    )


def _prompts(prompt: str | list[str | int | list[int]], add_special_tokens: bool) -> Texts | Ids:
    if isinstance(prompt, str):
        return Texts([prompt], add_special_tokens)
    kinds = set(map(type, prompt))  # one pass at C's speed: the loop must not stand still for 100,000 ids
    if kinds == {int}:
        return Ids([cast(list[int], prompt)])
    if len(prompt) > MAX_CHOICES:
        raise InvalidRequest(f"prompt must have at most {MAX_CHOICES} entries", field="prompt")
    if kinds == {str}:
        return Texts(cast(list[str], prompt), add_special_tokens)
    if kinds == {list}:
        return Ids(cast(list[list[int]], prompt))
    raise InvalidRequest("prompt must be a text, texts, ids or lists of ids, not a mixture", field="prompt")


class CompletionFormat(OpenAIFormat):
    id_prefix: ClassVar[str] = "cmpl"
    chunk_object: ClassVar[str] = "text_completion"
    reply_object: ClassVar[str] = "text_completion"

    def opening(self, index: int) -> bytes:
        return b""

    def delta(self, index: int, piece: Piece) -> bytes:
        logprobs = encode(_logprobs(piece.tokens)) if self.with_logprobs else b"null"
        return self._chunk(
            index, b'"text":%b,"logprobs":%b,"finish_reason":null' % (encode(piece.text), logprobs)
        )

    def finish(self, index: int, ending: Ending) -> bytes:
        rest = b'"text":"","logprobs":null,"finish_reason":"%b"' % ending.reason.encode()
        return self._last_chunk(index, rest, ending.promise)

    def choice(self, choice: FinishedChoice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": _logprobs(choice.tokens) if self.with_logprobs else None,
            "finish_reason": choice.ending.reason,
        }


def _logprobs(tokens: list[TokenText]) -> dict[str, Any]:
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        # The chosen token is always among them, as OpenAI has it.
        "top_logprobs": [
            # Of two with one text the likelier: they come in that order.
            {other.text: other.logprob for other in reversed(token.top)} | {token.text: token.logprob}
            for token in tokens
        ],
        "text_offset": [token.offset for token in tokens],
    }
