"""One choice of an answer: tokens come in, visible text goes out, until something ends it; and its times.

Owns the order of detokenising, stop strings and the end, and holds back a token that may be the end; knows
nothing of JSON or HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from microserve.gateway.parsing.events import Event
from microserve.gateway.routers.mailbox import Mailbox, TokenBatch
from microserve.gateway.text.answer.echo import Echo
from microserve.gateway.text.answer.scored import ScoredPrompt
from microserve.gateway.text.answer.stop import StopMatcher
from microserve.gateway.text.answer.transcript import TokenText, Transcript
from microserve.gateway.text.options import SHOWN_BY_DEFAULT, TextOptions
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.protocol.errors import MeshError, PeerError, ProtocolViolation, error_for
from microserve.protocol.messages.engine import TokenLogprob
from microserve.protocol.messages.numerics import UNKNOWN, Numerics
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.messages.router import Ended


@dataclass(slots=True)
class Piece:
    """What one wake-up adds to the answer."""

    text: str = ""
    tokens: list[TokenText] = field(default_factory=list)
    finish_reason: str | None = None
    events: Sequence[Event] = ()
    """Instead of ``text``, where what the answer says is read (``reading.py``)."""

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens or self.finish_reason or self.events)


@dataclass(slots=True)
class Timeline:
    """Times of one choice by ``time.monotonic``; None: it did not get so far.

    Not the loop's clock: uvloop's has milliseconds only.
    """

    arrived: float
    tokenising: float | None = None
    submitted: float | None = None
    """Tokenised and sent to the router."""
    first_token: float | None = None
    ended: float | None = None

    def copy(self) -> Timeline:
        return Timeline(self.arrived, self.tokenising, self.submitted, self.first_token, self.ended)


class Choice:
    """One of the ``n`` answers to a prompt, as it grows. ``finish_reason`` or ``error`` is set at its end."""

    is_read: ClassVar[bool] = False
    """Is there more in it than text?"""
    num_reasoning_tokens = 0
    num_calls = 0
    num_unread = 0
    """Calls that could not be read."""

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        *,
        index: int,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        stop: Sequence[str],
        times: Timeline,
        text: TextOptions = SHOWN_BY_DEFAULT,
        echo: bool = False,
        scored: ScoredPrompt | None = None,
        eos_token_ids: Callable[[], Collection[int]] = tuple,
    ) -> None:
        """``echo``: it begins with its prompt. ``scored``: what comes of the prompt's own tokens, if that is
        told. ``eos_token_ids``: the model's, asked when the first token is here: who brings it knows them."""
        vocabulary = tokenizer.vocabulary_for(text)
        self.index = index
        self.num_prompt_tokens = len(prompt_ids)
        self.times = times
        self.num_output_tokens = 0
        self.finish_reason: str | None = None
        self.error: MeshError | None = None
        self.mailbox: Mailbox | None = None
        self.last_tokens_at = 0.0
        self.opened = False
        """Its first event has been sent."""
        self.scored = scored
        self._sum_logprobs = 0.0
        self._detokenizer = tokenizer.detokenizer(() if echo else prompt_ids, vocabulary)
        self._include_stop = text.include_stop
        self._matcher = StopMatcher(stop, include=text.include_stop) if stop else None
        self._min_tokens = sampling.min_tokens
        self._transcript = Transcript(vocabulary) if sampling.logprobs is not None else None
        self._tells_end = echo
        """The token that ends it is among those that are told of: as many as there are."""
        self._echo: Echo | None = None
        if echo:
            num_top = sampling.logprobs or 0
            self._echo = Echo(prompt_ids, self._detokenizer, self._transcript, scored, num_top)
        self._eos_token_ids: Callable[[], Collection[int]] = (
            eos_token_ids if sampling.ends_by_eos() else tuple
        )
        self._stop_token_ids = sampling.stop_token_ids
        self._stop_ids: frozenset[int] | None = None
        self._held: tuple[int, TokenLogprob | None] | None = None
        """A token that may be the end, whose text is only shown on request. The token comes before the word
        that it was the end: by another engine, or from a router that is lost since."""

    @property
    def over(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def is_plain(self) -> bool:
        """Its tokens are text and nothing else, and only the router says when it ends."""
        return (
            self._matcher is None
            and self._transcript is None
            and self.scored is None
            and not self.is_read
            and not self.awaits_prompt
        )

    @property
    def mean_logprob(self) -> float:
        """Of its own tokens; without any it is less likely than whatever has some."""
        return self._sum_logprobs / self.num_output_tokens if self.num_output_tokens else -math.inf

    @property
    def awaits_prompt(self) -> bool:
        """What it begins with has not all been shown: its tokens have to wait."""
        return self._echo is not None and not self._echo.is_over

    @property
    def lacks_prompt(self) -> bool:
        """What is to be told of its prompt has not all come, or not all been shown."""
        return self.scored is not None and (self.awaits_prompt or not self.scored.is_whole)

    @property
    def has_prompt(self) -> bool:
        """Of that there is more to show now."""
        return self._echo is not None and self._echo.has_more

    @property
    def told_reason(self) -> str | None:
        """``finish_reason`` as clients know it."""
        return self.finish_reason

    @property
    def stop_string(self) -> str | None:
        """The one of the request's that has ended it."""
        return None if self._matcher is None else self._matcher.matched

    @property
    def ended(self) -> Ended | None:
        """The router's own account of the choice, once it is in."""
        return None if self.mailbox is None else self.mailbox.ended

    @property
    def numerics(self) -> Numerics:
        """In which class its output so far was made."""
        return UNKNOWN if self.mailbox is None else self.mailbox.numerics

    def push(self, batch: TokenBatch) -> Piece:
        """Take new tokens and perhaps the end. What comes after the end is ignored. While it awaits its
        prompt, what it brings is more of that."""
        piece = Piece()
        if self.over:
            return piece
        if self._echo is not None and not self._echo.is_over:
            piece.text, piece.tokens = self._echo.show()
        if self._stop_ids is None:
            self._stop_ids = frozenset((*self._stop_token_ids, *self._eos_token_ids()))
        stop_ids = self._stop_ids
        if batch.ended is not None and batch.ended.stop_token_id is not None:
            stop_ids |= {batch.ended.stop_token_id}  # in one message no race is possible
        if (
            self._matcher is None
            and self._transcript is None
            and not self.is_read
            and self._held is None
            and stop_ids.isdisjoint(batch.token_ids)
        ):
            self.num_output_tokens += len(batch.token_ids)
            piece.text += self._detokenizer.push(batch.token_ids)
        else:
            self._push_one_by_one(batch, stop_ids, piece)
        if batch.ended is not None and not self.over:
            self._end(batch.ended, piece)
        piece.finish_reason = self.finish_reason
        return piece

    def _push_one_by_one(self, batch: TokenBatch, stop_ids: frozenset[int], piece: Piece) -> None:
        """Token by token, so that the answer does not depend on how tokens were merged on their way."""
        for position, token_id in enumerate(batch.token_ids):
            logprob = None if self._transcript is None else batch.logprobs[position]
            self._show_held(piece)
            if self.over:
                return
            self.num_output_tokens += 1
            self._sum_logprobs += 0.0 if logprob is None else logprob.logprob
            if token_id in stop_ids:
                self._held = (token_id, logprob)
            else:
                self._show(token_id, logprob, piece)
            if self.over:
                return

    def _show_held(self, piece: Piece) -> None:
        if self._held is not None:
            held, self._held = self._held, None
            self._show(*held, piece)

    def _show(self, token_id: int, logprob: TokenLogprob | None, piece: Piece) -> None:
        previous = self._detokenizer.previous
        share, text = self._detokenizer.step(token_id)
        if self._transcript is not None and logprob is not None:
            pending = self._detokenizer.pending
            self._transcript.add(token_id, share, text, logprob, previous=previous, pending=pending)
        self._reveal(text, piece)

    def _reveal(self, text: str, piece: Piece) -> None:
        """What stop strings leave of it, and the tokens of what is out now."""
        matcher = self._matcher
        if matcher is not None:
            # As in vLLM, a stop string counts when it is complete behind the first min_tokens tokens.
            text = matcher.push(text, may_stop=self.num_output_tokens > self._min_tokens)
            if matcher.stopped:
                self.finish_reason = "stop"
        piece.text += text
        if self._transcript is not None:
            piece.tokens += self._transcript.reveal(len(text), is_over=self.over)

    def _end(self, ended: Ended, piece: Piece) -> None:
        if ended.reason == "error":
            self.error = error_for(
                ended.code, ended.detail, field=ended.field, retry_after_s=ended.retry_after_s
            )
        elif ended.reason == "abort":
            self.error = PeerError("the router gave the request up")
        elif ended.reason not in ("stop", "length"):
            self.error = ProtocolViolation(f"a request ended for the unknown reason {ended.reason[:32]!r}")
        else:
            if ended.reason != "stop" or self._include_stop:
                self._show_held(piece)
            elif self._tells_end and self._held is not None and self._transcript is not None:
                token_id, logprob = self._held
                if logprob is not None:
                    self._transcript.add_end(token_id, logprob, previous=self._detokenizer.previous)
            if not self.over:
                self._reveal(self._detokenizer.flush(), piece)
            if not self.over:
                self._conclude(piece, is_cut=ended.reason == "length")
            if not self.over:
                self.finish_reason = ended.reason
                self._reveal_rest(piece)

    def _conclude(self, piece: Piece, *, is_cut: bool) -> None:
        """Nothing more comes; ``is_cut``: by a bound, not by the model."""

    def cut_short(self, piece: Piece) -> None:
        """Its time is over: what there is, is the answer, and ``piece`` its last one."""
        reason = self._reason_of_cut(piece)
        if not self.over:
            self.finish_reason = reason
            text = self._detokenizer.flush()
            if self._matcher is not None:
                text = self._matcher.push(text, may_stop=False)
            piece.text += text
            if self._transcript is not None:
                piece.tokens += self._transcript.reveal(len(text), is_over=False)
            self._reveal_rest(piece)
        piece.finish_reason = self.finish_reason

    def _reason_of_cut(self, piece: Piece) -> str:
        """Of a token that may be the end only the word was still missing."""
        self.error = None
        reason = "length" if self._held is None else "stop"
        if self._include_stop:
            self._show_held(piece)
        return reason

    def _reveal_rest(self, piece: Piece) -> None:
        """What was held back for a stop string that never became whole."""
        text = "" if self._matcher is None else self._matcher.flush()
        piece.text += text
        if self._transcript is not None:
            piece.tokens += self._transcript.reveal(len(text), is_over=True)
