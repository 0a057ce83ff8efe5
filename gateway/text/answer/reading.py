"""A choice in whose answer there is more than text: what the model thought, and its calls of tools.

Owns how tokens come to a reader (``parsing``), where stop strings count (in the text, not in thoughts or
arguments), and how many tokens were thoughts. Which families there are is the reader's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from microserve.gateway.parsing.events import Event, Said
from microserve.gateway.parsing.parsers import NO_MARKS, ModelParsers, Wanted
from microserve.gateway.parsing.reader import AnswerReader
from microserve.gateway.routers.mailbox import TokenBatch
from microserve.gateway.text.answer.choice import Choice, Piece
from microserve.gateway.text.answer.stop import StopMatcher
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.protocol.messages.engine import TokenLogprob


@dataclass(frozen=True, slots=True)
class Reading:
    """How the answers of one request are read."""

    parsers: ModelParsers
    wanted: Wanted
    is_continued: bool = False
    """The answer goes on with a text that the prompt ends with, of any length."""
    is_named: bool = False
    """The call is the client's own choice: it is no reason to finish that needs telling."""
    _tails: list[tuple[Sequence[int], str]] = field(default_factory=list, repr=False, compare=False)
    """The last prompt and how it ends: all choices of a request have the same."""

    def reader(self, tokenizer: ModelTokenizer, prompt_ids: Sequence[int]) -> AnswerReader:
        if not self._tails or self._tails[0][0] is not prompt_ids:
            self._tails[:] = [
                (prompt_ids, tokenizer.tail(prompt_ids, self.marks, all_of_it=self.is_continued))
            ]
        return self.parsers.reader(self.wanted, self._tails[0][1])

    def thought_ends(self, tokenizer: ModelTokenizer, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """The tokens behind which what the answer must be begins; none: at once, for there is no thought."""
        end = self.parsers.answer_begins(self.reader(tokenizer, prompt_ids))
        return tokenizer.ids_of(end) if end else ()

    @property
    def grammar_has_thoughts(self) -> bool:
        """Does a grammar of calls say what is thought before them, too?"""
        tools = self.parsers.tools
        return tools is not None and tools.messages is not None

    @property
    def marks(self) -> Mapping[int, str]:
        """Tokens that come in as markers."""
        return self.parsers.mark_of_token(self.wanted)


class ReadChoice(Choice):
    """As a choice, with ``Piece.events`` in the place of its text."""

    is_read: ClassVar[bool] = True

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        *,
        reading: Reading,
        prompt_ids: Sequence[int],
        stop: Sequence[str],
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, prompt_ids=prompt_ids, stop=stop, **options)
        self._reader = reading.reader(tokenizer, prompt_ids)
        self._marks: Mapping[int, str] = reading.marks
        self._is_named = reading.is_named
        self._stop = stop
        self._events: list[Event] = []
        """Of the piece at hand."""

    @property
    def num_calls(self) -> int:  # type: ignore[override]
        return self._reader.num_calls

    @property
    def num_unread(self) -> int:  # type: ignore[override]
        return self._reader.num_unread

    @property
    def told_reason(self) -> str | None:
        if self.finish_reason == "stop" and self.num_calls:
            return "stop" if self._is_named else "tool_calls"
        return self.finish_reason

    def push(self, batch: TokenBatch) -> Piece:
        piece = super().push(batch)
        piece.events, self._events = self._events, []
        return piece

    def _show(self, token_id: int, logprob: TokenLogprob | None, piece: Piece) -> None:
        mark = self._marks.get(token_id)
        if mark is None:
            super()._show(token_id, logprob, piece)
        else:
            self._tell(self._reader.push(mark))
        self.num_reasoning_tokens += self._reader.kind == "reasoning"

    def _reveal(self, text: str, piece: Piece) -> None:
        self._tell(self._reader.push(text.translate(NO_MARKS)))
        if self._transcript is not None:
            tokens = self._transcript.reveal(len(text), is_over=self.over)
            piece.tokens += tokens if self._reader.kind == "content" else []

    def _tell(self, events: Sequence[Event]) -> None:
        for event in events:
            if self.over:
                return
            if self._matcher is None:
                self._events.append(event)
            elif isinstance(event, Said) and event.kind == "content":
                may_stop = self.num_output_tokens > self._min_tokens
                text = self._matcher.push(event.text, may_stop=may_stop)
                if text:
                    self._events.append(Said("content", text))
                if self._matcher.stopped:
                    self.finish_reason = "stop"
            else:
                self._release()
                self._events.append(event)
        if self._reader.enough and not self.over:
            self.finish_reason = "stop"

    def _release(self) -> None:
        """What might have become a stop string, and is not the text's end."""
        if self._matcher is not None and (held := self._matcher.flush()):
            self._events.append(Said("content", held))
            self._matcher = StopMatcher(self._stop, include=self._include_stop)

    def _conclude(self, piece: Piece, *, is_cut: bool) -> None:
        self._tell(self._reader.finish(is_cut=is_cut))

    def cut_short(self, piece: Piece) -> None:
        reason = self._reason_of_cut(piece)
        if not self.over:
            self._reveal(self._detokenizer.flush(), piece)
        if not self.over:
            self._conclude(piece, is_cut=True)
        if not self.over:
            self.finish_reason = reason
            self._reveal_rest(piece)
        piece.events, self._events = [*piece.events, *self._events], []
        piece.finish_reason = self.finish_reason

    def _reveal_rest(self, piece: Piece) -> None:
        self._release()
