"""A prompt whose own tokens are told of: their log-probabilities as they come, for all of its choices.

Owns the rows; how a prompt begins an answer (``echo``) is its choices'. Knows nothing of JSON.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from microserve.gateway.text.answer.transcript import finite
from microserve.gateway.text.vocabulary import Vocabulary
from microserve.protocol.messages.engine import TokenLogprob
from microserve.protocol.messages.request.prompt_logprobs import FIRST_POSITION, PromptLogprob, PromptLogprobs


@dataclass(frozen=True, slots=True)
class RankedToken:
    """A token that stands at a place of the prompt, or could."""

    token_id: int
    text: str
    logprob: float
    rank: int
    """1: no token is likelier there."""


class ScoredPrompt:
    """``add`` rows as they come, each once and in order."""

    def __init__(self, token_ids: Sequence[int], vocabulary: Vocabulary) -> None:
        """``vocabulary``: by which tokens are named."""
        self.token_ids = token_ids
        self._vocabulary = vocabulary
        self._pieces: list[PromptLogprobs] = []
        self._num_known = FIRST_POSITION
        """Tokens of which all is known; the first has nothing before it."""

    @property
    def num_known(self) -> int:
        return self._num_known

    @property
    def is_whole(self) -> bool:
        return self._num_known >= len(self.token_ids)

    def add(self, rows: PromptLogprobs) -> None:
        self._pieces.append(rows)
        self._num_known = rows.end

    def logprobs(self, begin: int, end: int, num_top: int) -> Iterator[TokenLogprob | None]:
        """Of the tokens ``[begin, end)``, and so many of the likeliest beside each; None of the first."""
        if begin < FIRST_POSITION <= end:
            yield None
        for row in self._rows(begin, end):
            yield TokenLogprob(row.logprob, list(row.top[:num_top]))

    def ranked(self, num_top: int) -> Iterator[list[RankedToken] | None]:
        """Of every token: itself, then so many of the likeliest; None of the first."""
        vocabulary, previous = self._vocabulary, self.token_ids[0]
        shown = None if vocabulary.is_hidden(previous) else previous
        yield None
        for token_id, row in zip(self.token_ids[1:], self._rows(1, len(self.token_ids)), strict=True):
            candidates = [(token_id, row.logprob, row.rank)]
            top = enumerate(row.top[:num_top], start=1)
            candidates += [(other, logprob, rank) for rank, (other, logprob) in top if other != token_id]
            yield [
                RankedToken(
                    other, vocabulary.name(other, vocabulary.share(other, shown)), finite(value), rank
                )
                for other, value, rank in candidates
            ]
            shown = shown if vocabulary.is_hidden(token_id) else token_id

    def _rows(self, begin: int, end: int) -> Iterator[PromptLogprob]:
        for piece in self._pieces:
            if piece.end > begin and piece.begin < end:
                yield from piece.behind(begin).until(end)
