"""The prompt at the begin of an answer: its text, and its tokens with what is told of them.

Owns which of its tokens have been shown. They go through the detokenizer and the transcript of the choice, so
the answer's own text goes on where the prompt's ends, in the middle of a character if need be.
"""

from __future__ import annotations

from collections.abc import Sequence

from microserve.gateway.text.answer.scored import ScoredPrompt
from microserve.gateway.text.answer.transcript import TokenText, Transcript
from microserve.gateway.text.detokenizer import Detokenizer

MAX_TOKENS_AT_ONCE = 512
"""A long prompt is shown in several goes: others' tokens have to come through in between."""


class Echo:
    """``show`` as more is known of the prompt, until it ``is_over``."""

    def __init__(
        self,
        prompt_ids: Sequence[int],
        detokenizer: Detokenizer,
        transcript: Transcript | None,
        scored: ScoredPrompt | None,
        num_top: int,
    ) -> None:
        """``transcript``: None where only the text is asked for, which waits for nothing."""
        self._prompt_ids = prompt_ids
        self._detokenizer = detokenizer
        self._transcript = transcript
        self._scored = scored
        self._num_top = num_top
        self._num_shown = 0

    @property
    def is_over(self) -> bool:
        return self._num_shown >= len(self._prompt_ids)

    @property
    def has_more(self) -> bool:
        """There is something to show now."""
        known = len(self._prompt_ids) if self._scored is None else self._scored.num_known
        return self._num_shown < known

    def show(self) -> tuple[str, list[TokenText]]:
        """More of the text, and the tokens of it."""
        begin = self._num_shown
        if self._transcript is None or self._scored is None:
            self._num_shown = len(self._prompt_ids)
            return self._detokenizer.push(self._prompt_ids[begin:]), []
        end = self._num_shown = min(begin + MAX_TOKENS_AT_ONCE, self._scored.num_known)
        texts, tokens = [], []
        logprobs = self._scored.logprobs(begin, end, self._num_top)
        for token_id, logprob in zip(self._prompt_ids[begin:end], logprobs, strict=True):
            previous = self._detokenizer.previous
            share, text = self._detokenizer.step(token_id)
            pending = self._detokenizer.pending
            self._transcript.add(token_id, share, text, logprob, previous=previous, pending=pending)
            tokens += self._transcript.reveal(len(text), is_over=False)
            texts.append(text)
        return "".join(texts), tokens
