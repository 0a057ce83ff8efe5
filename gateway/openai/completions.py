"""``/v1/completions``: prompts in, their continuation out."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from microserve.gateway.api.format import Ending, FinishedChoice
from microserve.gateway.openai.answer import OpenAIFormat, encode, name_of
from microserve.gateway.openai.common import options_of, wish_of
from microserve.gateway.openai.grammar import asked_of
from microserve.gateway.openai.schema import CompletionRequest
from microserve.gateway.request.request import MAX_CHOICES, GenerateRequest, Ids, Texts
from microserve.gateway.text.answer.choice import Piece
from microserve.gateway.text.answer.transcript import TokenText
from microserve.protocol.errors import InvalidRequest

DEFAULT_MAX_TOKENS = 16


def completion_request(body: CompletionRequest) -> GenerateRequest:
    """Raises :class:`InvalidRequest` naming the field."""
    if body.max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
        raise InvalidRequest(
            "max_tokens must be at least 1 without echo or prompt_logprobs", field="max_tokens"
        )
    n, best_of = 1 if body.n is None else body.n, body.best_of
    if best_of is not None and best_of < n:
        raise InvalidRequest(f"best_of must be at least n, which is {n}", field="best_of")
    if best_of is not None and best_of > n and body.stream:
        raise InvalidRequest("of a stream best_of must be n: the best are known at the end", field="best_of")
    return GenerateRequest(
        prompt=_prompts(body.prompt, body.add_special_tokens is not False),
        sampling=wish_of(
            body,
            max_tokens=body.max_tokens,
            logprobs=body.logprobs,
            default_max_tokens=DEFAULT_MAX_TOKENS,
        ),
        grammar=asked_of(body),
        shows_prompt=bool(body.echo),
        best_of=best_of if best_of != n else None,
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
        logprobs = encode(_logprobs(piece.tokens, by_id=self.by_id)) if self.with_logprobs else b"null"
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
            "logprobs": _logprobs(choice.tokens, by_id=self.by_id) if self.with_logprobs else None,
            "finish_reason": choice.ending.reason,
            **self.prompt_member(choice),
        }


def _logprobs(tokens: list[TokenText], *, by_id: bool) -> dict[str, Any]:
    return {
        "tokens": [name_of(token, by_id=by_id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top(token, by_id=by_id) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _top(token: TokenText, *, by_id: bool) -> dict[str, float | None] | None:
    """The chosen token is always among them, as OpenAI has it. Of two others with one text the likelier; one
    with the text of the chosen token goes by its id, for what is likeliest is not lost."""
    if token.logprob is None:
        return None
    own = name_of(token, by_id=by_id)
    top: dict[str, float | None] = {}
    for other in token.top:
        name = name_of(other, by_id=by_id or (other.text == own and other.token_id != token.token_id))
        top.setdefault(name, other.logprob)
    return top | {own: token.logprob}
