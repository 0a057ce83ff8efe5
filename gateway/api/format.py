"""What an answer is made of, and the base of what makes bytes of it: one format an API, one object a request.

Owns no bytes and no names of fields: those are an API's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from microserve.gateway.http.errors import Problem
from microserve.gateway.http.sse import PING, event
from microserve.gateway.parsing.events import Event
from microserve.gateway.request.request import GenerateRequest
from microserve.gateway.text.answer.choice import Piece
from microserve.gateway.text.answer.scored import ScoredPrompt
from microserve.gateway.text.answer.transcript import TokenText
from microserve.protocol.messages.request.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Answering:
    """What a format may know when an answer begins."""

    request: GenerateRequest
    """Without its prompt where a helper has read it."""
    sampling: SamplingParams
    """Of its first choice, with all defaults."""
    unique_id: str
    created: int
    """Seconds since 1970."""
    model: str
    fingerprint: str
    num_prompt_tokens: int
    """Of all prompts."""
    keeps: bool = False
    """What :attr:`AnswerFormat.kept` says is kept."""


@dataclass(frozen=True, slots=True)
class UsageCounts:
    """Tokens of one HTTP request; a prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int | None = None
    """Of the completion's; None where nothing was looked for."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Why, and how, one choice is over."""

    reason: str
    """``stop``, ``length``, or ``tool_calls`` for calls that the model chose to make."""
    promise: str
    """As in the header ``x-microserve-exact``: in which numerics class the whole choice was made."""
    stop: str | None = None
    """The stop string that has ended it."""


@dataclass(slots=True)
class FinishedChoice:
    """One finished choice of an answer that is not streamed."""

    index: int
    text: str
    tokens: list[TokenText]
    ending: Ending
    events: list[Event] | None = None
    """Instead of ``text``, of an answer that was read."""
    pieces: Sequence[Piece] = ()
    """All of it in the order of its growing."""
    scored: ScoredPrompt | None = None
    """Its prompt, if what is told of that is asked for."""

    @property
    def num_told(self) -> int:
        """Tokens that are told of one by one."""
        return len(self.tokens) + (0 if self.scored is None else len(self.scored.token_ids))


class AnswerFormat(ABC):
    """Renders one request's answer: the events of a stream, or a reply."""

    needs_usage: bool = False
    """The end of a stream tells of tokens: :meth:`end` gets the counts."""

    kept: tuple[str, bytes] | None = None
    """Name and content of what is to be kept, known before the last bytes are sent."""

    @abstractmethod
    def opening(self, index: int) -> bytes:
        """Event before the first one of a choice; may be empty."""

    @abstractmethod
    def delta(self, index: int, piece: Piece) -> bytes:
        """Events with what a piece says, and its tokens' log-probabilities."""

    @abstractmethod
    def finish(self, index: int, ending: Ending) -> bytes:
        """Last event of a choice."""

    @abstractmethod
    def end(self, counts: UsageCounts | None) -> bytes:
        """Last events of a stream that went well."""

    def failed(self, problem: Problem) -> bytes:
        """Last events of a stream that did not."""
        return event(problem.envelope())

    def ping(self) -> bytes:
        """Of a stream, while there is nothing to say."""
        return PING

    @abstractmethod
    def reply(self, choices: Sequence[FinishedChoice], counts: UsageCounts) -> bytes:
        """The whole answer of a request that is not streamed, as JSON."""
