"""``/v1/completions``: prompts in, their continuation out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

from microserve.gateway.openai.answer import AnswerFormat, FinishedChoice, encode
from microserve.gateway.openai.schema import MAX_CHOICES, CompletionRequest
from microserve.gateway.routers.link import ModelLimits
from microserve.gateway.text.choice import Piece
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.gateway.text.transcript import TokenText
from microserve.protocol.errors import InvalidRequest


async def completion_prompts(
    request: CompletionRequest, tokenizer: ModelTokenizer, limits: ModelLimits
) -> Sequence[Sequence[int]]:
    """Ids of every prompt, in order. Raises :class:`InvalidRequest` (field ``prompt``)."""
    prompt = request.prompt
    texts, ids_given = ([prompt], []) if isinstance(prompt, str) else _sorted_out(prompt)
    given: Sequence[Sequence[int]] = ids_given
    if len(texts) + len(given) > MAX_CHOICES:
        raise InvalidRequest(f"prompt must have at most {MAX_CHOICES} entries", field="prompt")
    for ids in given:
        if ids and max(ids) >= limits.vocab_size:
            raise InvalidRequest(f"prompt has ids outside 0 to {limits.vocab_size - 1}", field="prompt")
    if texts:
        given = await tokenizer.encode(texts, add_special_tokens=True, max_tokens=limits.max_model_len)
    if not all(given):
        raise InvalidRequest("prompt must have at least one token", field="prompt")
    return given


def _sorted_out(prompt: list[str | int | list[int]]) -> tuple[list[str], list[list[int]]]:
    """The list's texts, or its lists of ids; one of both is empty."""
    kinds = set(map(type, prompt))  # one pass at C's speed: the loop must not stand still for 100,000 ids
    if kinds == {str}:
        return cast(list[str], prompt), []
    if kinds == {int}:
        return [], [cast(list[int], prompt)]
    if kinds == {list}:
        return [], cast(list[list[int]], prompt)
    raise InvalidRequest("prompt must be a text, texts, ids or lists of ids, not a mixture", field="prompt")


class CompletionFormat(AnswerFormat):
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

    def finish(self, index: int, reason: str, promise: str) -> bytes:
        rest = b'"text":"","logprobs":null,"finish_reason":"%b"' % reason.encode()
        return self._last_chunk(index, rest, promise)

    def choice(self, choice: FinishedChoice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": _logprobs(choice.tokens) if self.with_logprobs else None,
            "finish_reason": choice.finish_reason,
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
