"""One choice of an answer: tokens come in, visible text goes out, until something ends it; and its times.

Owns the order of detokenising, stop strings and the end; knows nothing of JSON or HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from microserve.gateway.routers.mailbox import Mailbox, TokenBatch
from microserve.gateway.text.stop import StopMatcher
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.protocol.errors import MeshError, PeerError, ProtocolViolation, error_for
from microserve.protocol.messages.engine import TokenLogprob
from microserve.protocol.messages.router import Ended
from microserve.protocol.messages.sampling import SamplingParams

LOWEST_LOGPROB = -9999.0
"""What OpenAI sends for minus infinity, which JSON cannot say."""


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token as the ``logprobs`` of an answer show it."""

    text: str
    data: bytes
    logprob: float
    top: list[TokenText] = field(default_factory=list)
    offset: int = 0
    """Characters of all tokens before it."""


@dataclass(slots=True)
class Piece:
    """What one wake-up adds to the answer."""

    text: str = ""
    tokens: list[TokenText] = field(default_factory=list)
    finish_reason: str | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens or self.finish_reason)


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


class Choice:
    """One of the ``n`` answers to a prompt, as it grows. ``finish_reason`` or ``error`` is set at its end."""

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        *,
        index: int,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        stop: Sequence[str],
        times: Timeline,
    ) -> None:
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
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer(prompt_ids)
        self._matcher = StopMatcher(stop) if stop else None
        self._min_tokens = sampling.min_tokens
        self._with_logprobs = sampling.logprobs is not None
        self._num_chars = 0

    @property
    def over(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def ended(self) -> Ended | None:
        """The router's own account of the choice, once it is in."""
        return None if self.mailbox is None else self.mailbox.ended

    def push(self, batch: TokenBatch) -> Piece:
        """Take new tokens and perhaps the end. What comes after the end is ignored."""
        if self.over:
            return Piece()
        token_ids = batch.token_ids
        num_shown = len(token_ids)
        ended = batch.ended
        if ended is not None and token_ids and token_ids[-1] == ended.stop_token_id:
            num_shown -= 1  # it ended the choice and carries no text
        if self._matcher is None and not self._with_logprobs:
            piece = Piece(self._detokenizer.push(token_ids[:num_shown] if ended else token_ids))
            self.num_output_tokens += len(token_ids)
        else:
            piece = self._push_one_by_one(batch, num_shown)
        if ended is not None and not self.over:
            self._end(ended, piece)
        piece.finish_reason = self.finish_reason
        return piece

    def _push_one_by_one(self, batch: TokenBatch, num_shown: int) -> Piece:
        """Token by token, so that the answer does not depend on how tokens were merged on their way."""
        piece = Piece()
        for position, token_id in enumerate(batch.token_ids):
            self.num_output_tokens += 1
            if position >= num_shown:
                break
            text = self._detokenizer.push((token_id,))
            if self._with_logprobs:
                piece.tokens.append(self._token_text(token_id, batch.logprobs[position]))
            # As in vLLM, a stop string counts only behind the first min_tokens tokens.
            if self._matcher is not None and self.num_output_tokens > self._min_tokens:
                text = self._matcher.push(text)
            piece.text += text
            if self._matcher is not None and self._matcher.stopped:
                self.finish_reason = "stop"
                break
        return piece

    def _token_text(self, token_id: int, logprob: TokenLogprob) -> TokenText:
        text = self._tokenizer.token_text(token_id)
        offset = self._num_chars
        self._num_chars += len(text)
        top = [self._alternative(other, value) for other, value in logprob.top]
        data = self._tokenizer.token_bytes(token_id)
        return TokenText(text, data, _finite(logprob.logprob), top, offset)

    def _alternative(self, token_id: int, logprob: float) -> TokenText:
        return TokenText(
            self._tokenizer.token_text(token_id), self._tokenizer.token_bytes(token_id), _finite(logprob)
        )

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
            text = self._detokenizer.flush()
            if self._matcher is not None:
                text = self._matcher.push(text)
                text += self._matcher.flush()
            piece.text += text
            stopped = self._matcher is not None and self._matcher.stopped
            self.finish_reason = "stop" if stopped else ended.reason


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB) if not math.isnan(logprob) else LOWEST_LOGPROB
