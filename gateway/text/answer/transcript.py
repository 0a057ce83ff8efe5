"""The tokens of one choice beside its text, for ``logprobs``: each with its share of what is visible.

Owns the tokens whose text is not out yet. A token comes out with its text, never before; what a stop string
takes from the text it takes from the tokens as well, so the bytes of all tokens joined are the answer's text.
Knows nothing of JSON.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace

from microserve.gateway.text.vocabulary import Vocabulary, text_of
from microserve.protocol.messages.engine import TokenLogprob

LOWEST_LOGPROB = -9999.0
"""What OpenAI sends for minus infinity, which JSON cannot say."""


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token as the ``logprobs`` of an answer show it."""

    text: str
    """Of the token by itself; the name of a special one, ``bytes:\\xe4`` of a part of a character."""
    data: bytes
    """Its share of the answer's text."""
    logprob: float | None
    """None: of a prompt's first token, which nothing stands before."""
    top: list[TokenText] = field(default_factory=list)
    offset: int = 0
    """Whole characters of the answer before it."""
    token_id: int = -1


class Transcript:
    """``add`` each token that is shown, ``reveal`` as its text becomes visible."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._waiting: deque[tuple[TokenText, int]] = deque()
        """With the characters of the answer up to the token's end."""
        self._num_chars = 0
        """Whole characters of all tokens."""
        self._num_visible = 0
        self._pending = b""
        """Of the last token: the beginning of a character."""

    def add(
        self,
        token_id: int,
        share: bytes,
        text: str,
        logprob: TokenLogprob | None,
        *,
        previous: int | None,
        pending: bytes,
    ) -> None:
        """A token with its ``share`` behind ``previous``; ``text``: the whole characters that it completes;
        ``pending``: the beginning of a character that is left over."""
        vocabulary = self._vocabulary
        offset = self._num_chars
        broken = self._pending.decode("utf-8", "replace")
        if text.startswith(broken):  # no part of a character: it became U+FFFD by this token
            offset += len(broken)
        self._num_chars += len(text)
        self._pending = pending
        name = vocabulary.name(token_id, share)
        self._waiting.append(
            (
                self._told(token_id, name, share, logprob, offset, previous=previous),
                self._num_chars + bool(pending),
            )
        )

    def add_end(self, token_id: int, logprob: TokenLogprob, *, previous: int | None) -> None:
        """The token that ended the answer, of which nothing is shown."""
        vocabulary = self._vocabulary
        name = vocabulary.name(token_id, vocabulary.share(token_id, previous))
        told = self._told(token_id, name, b"", logprob, self._num_chars, previous=previous)
        self._waiting.append((told, self._num_chars))

    def _told(
        self,
        token_id: int,
        name: str,
        share: bytes,
        logprob: TokenLogprob | None,
        offset: int,
        *,
        previous: int | None,
    ) -> TokenText:
        vocabulary, top = self._vocabulary, []
        for other, value in () if logprob is None else logprob.top:
            data = vocabulary.share(other, previous)
            top.append(TokenText(vocabulary.name(other, data), data, finite(value), token_id=other))
        own = None if logprob is None else finite(logprob.logprob)
        return TokenText(name, share, own, top, offset, token_id)

    def reveal(self, num_chars: int, *, is_over: bool) -> list[TokenText]:
        """So many more characters are visible: the tokens of them. ``is_over``: no more will be, and the last
        token has only what is."""
        self._num_visible += num_chars
        tokens = []
        while self._waiting and self._waiting[0][1] <= self._num_visible:
            tokens.append(self._waiting.popleft()[0])
        if is_over:
            while self._waiting and self._waiting[0][0].offset < self._num_visible:
                tokens.append(_cut(self._waiting.popleft()[0], self._num_visible))
            self._waiting.clear()
        return tokens


def _cut(token: TokenText, end: int) -> TokenText:
    """What of the token lies before the answer's character ``end``."""
    starts = [0, *(i for i, byte in enumerate(token.data) if i and not _continues(byte))]
    num_chars = end - token.offset
    data = token.data[: starts[num_chars]] if num_chars < len(starts) else token.data
    return replace(token, text=text_of(data), data=data)


def _continues(byte: int) -> bool:
    """Whether it is within a character of UTF-8, not the first byte of one."""
    return byte & 0xC0 == 0x80


def finite(logprob: float) -> float:
    """As JSON can say it."""
    return max(logprob, LOWEST_LOGPROB) if not math.isnan(logprob) else LOWEST_LOGPROB
