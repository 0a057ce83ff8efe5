"""What an OpenAI answer has in common for both kinds: ids, usage, and how a streamed chunk is put together.

Owns bytes only. A chunk is a constant prefix, the text as JSON and a constant suffix: a token costs one
``encode`` of a string and no dictionary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec

from microserve.gateway.http.sse import event
from microserve.gateway.parsing.events import Event
from microserve.gateway.text.choice import Piece
from microserve.gateway.text.transcript import TokenText

encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class UsageCounts:
    """Tokens of one HTTP request; a prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int | None = None
    """Of the completion's; None where nothing was looked for."""

    def as_json(self) -> dict[str, Any]:
        details = self.reasoning_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            **({} if details is None else {"completion_tokens_details": {"reasoning_tokens": details}}),
        }


@dataclass(slots=True)
class FinishedChoice:
    """One finished choice of an answer that is not streamed."""

    index: int
    text: str
    tokens: list[TokenText]
    finish_reason: str
    events: list[Event] | None = None
    """Instead of ``text``, of an answer that was read."""


class AnswerFormat(ABC):
    """Renders one request's answer; every chunk has the same ``id`` and ``created``."""

    id_prefix: ClassVar[str]
    chunk_object: ClassVar[str]
    reply_object: ClassVar[str]

    def __init__(
        self,
        *,
        unique_id: str,
        created: int,
        model: str,
        fingerprint: str,
        include_usage: bool,
        with_logprobs: bool,
    ) -> None:
        """``created``: seconds since 1970. ``include_usage``: of a stream's chunks."""
        self.include_usage = include_usage
        self.with_logprobs = with_logprobs
        self._head: dict[str, Any] = {
            "id": f"{self.id_prefix}-{unique_id}",
            "object": self.chunk_object,
            "created": created,
            "model": model,
            "system_fingerprint": fingerprint,
        }
        opened = encode(self._head)[:-1] + b","
        self._chunk_head = b"data: " + opened + b'"choices":[{"index":'
        self._usage_member = b',"usage":null' if include_usage else b""
        self._chunk_tail = b"}]%b}\n\n" % self._usage_member
        self._usage_head = opened

    def _chunk(self, index: int, rest: bytes) -> bytes:
        """``rest``: members of the choice behind ``index``."""
        return b"%b%d,%b%b" % (self._chunk_head, index, rest, self._chunk_tail)

    def _last_chunk(self, index: int, rest: bytes, promise: str) -> bytes:
        """As :meth:`_chunk`, and in which numerics class the whole choice was made."""
        members = b'%b,"microserve":{"exact":%b}' % (self._usage_member, encode(promise))
        return b"%b%d,%b}]%b}\n\n" % (self._chunk_head, index, rest, members)

    @abstractmethod
    def opening(self, index: int) -> bytes:
        """Event before the first one of a choice; may be empty."""

    @abstractmethod
    def delta(self, index: int, piece: Piece) -> bytes:
        """Event with a piece's text and token log-probabilities."""

    @abstractmethod
    def finish(self, index: int, reason: str, promise: str) -> bytes:
        """Last event of a choice; ``promise`` as in the header ``x-microserve-exact``."""

    def usage(self, counts: UsageCounts) -> bytes:
        """Last event of a stream with ``include_usage``."""
        return event(self._usage_head + b'"choices":[],"usage":' + encode(counts.as_json()) + b"}")

    def reply(self, choices: Iterable[FinishedChoice], counts: UsageCounts) -> bytes:
        """The whole answer of a request that is not streamed, as JSON."""
        answer = {
            **self._head,
            "object": self.reply_object,
            "choices": [self.choice(choice) for choice in choices],
            "usage": counts.as_json(),
        }
        return encode(answer)

    @abstractmethod
    def choice(self, choice: FinishedChoice) -> dict[str, Any]:
        """One choice of a reply."""
