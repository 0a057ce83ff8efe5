"""Which tokens a sequence may take next: a grammar's state, brought up to the sequence's own tokens.

Sans-I/O, and the interface of the room: a ``Matcher`` knows a grammar, a ``Guide`` what a request makes of
it. The order in which things decide:

    before ``after_token_ids``: all but ends -> the grammar's own tokens, and ends where it may end
    -> no ends before ``min_tokens``, unless nothing else is left

A mask is never empty. Must not know logits or sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from microserve.protocol.errors import InternalError, InvalidRequest, MeshError
from microserve.protocol.messages.request.sampling import SamplingParams

Mask = npt.NDArray[np.uint32]
"""[ceil(vocab_size / 32)]: token t may be chosen if bit t % 32 of word t // 32 is set."""


class Matcher(Protocol):
    """Where in a grammar an output stands. For one thread at a time."""

    def mask(self) -> Mask:
        """What may come next; the caller's to change. Ends of the sequence may be in it or not. Raises
        :class:`MeshError` when the grammar became too much."""

    def may_end(self) -> bool:
        """Is the output so far one of the grammar?"""

    def take(self, token_id: int) -> None:
        """Raises :class:`MeshError` for a token that the grammar does not have here."""

    def fork(self) -> Matcher:
        """One that goes its own way from here."""


class Guiding(Protocol):
    """A guide in the making."""

    @property
    def is_done(self) -> bool:
        """Set last, by another thread: what follows is of use only once this was seen."""

    @property
    def guide(self) -> Guide | None:
        """Once it is done, if nothing failed."""

    @property
    def error(self) -> MeshError | None: ...
    def is_overdue(self, now: float) -> bool:
        """It has been worked at for longer than it may."""

    def cancel(self) -> None:
        """Nobody wants it any more. May be called at any time."""


class Guides(Protocol):
    """Makes guides; for any thread."""

    def prepare(
        self, params: SamplingParams, output: Sequence[int], ends: frozenset[int], on_done: Callable[[], None]
    ) -> Guiding:
        """A guide for a request with a grammar that has this output so far. ``ends``: the model's.

        Done at once where that is quick; else ``on_done`` is called from another thread when it is. Raises
        :class:`MeshError` for what cannot be constrained."""

    def close(self) -> None: ...


class Guide:
    """One sequence's. Its output only grows; asking twice at one place gives the same mask."""

    def __init__(
        self, matcher: Matcher, params: SamplingParams, ends: frozenset[int], vocab_size: int
    ) -> None:
        """``ends``: of the model. Raises :class:`InvalidRequest` where nothing could end the output."""
        grammar = params.grammar
        if grammar is None:
            raise InternalError("there is no grammar to guide by")
        self._matcher = matcher
        self._ends = bits_of({*ends, *params.stop_token_ids}, vocab_size)
        if not self._ends.any():
            raise InvalidRequest(
                "the model has no end of sequence: a grammar needs stop_token_ids", field="grammar"
            )
        self._vocab_size = vocab_size
        self._min_tokens = params.min_tokens
        self._after = list(grammar.after_token_ids)
        self._begin: int | None = None if self._after else 0
        """Of the output: where the grammar begins; None while it has not."""
        self._num_taken = 0
        """Output tokens that have been looked at."""

    def follow(self, output: Sequence[int]) -> None:
        """Take the tokens that have come since the last call. Raises :class:`MeshError` for one that the
        grammar does not have."""
        while self._num_taken < len(output):
            self._num_taken += 1
            if self._begin is not None:
                self._matcher.take(output[self._num_taken - 1])
                continue
            first = self._num_taken - len(self._after)
            if first >= 0 and list(output[first : self._num_taken]) == self._after:
                self._begin = self._num_taken

    def allowed(self, output: Sequence[int]) -> Mask:
        """What may come behind ``output``: at least one token."""
        self.follow(output)
        if self._begin is None:
            return full(self._vocab_size) & ~self._ends
        mask = self._matcher.mask()
        if self._matcher.may_end():
            mask |= self._ends
        if len(output) < self._min_tokens:
            others = mask & ~self._ends
            if others.any():
                return others
        if not mask.any():
            raise InternalError("the grammar leaves no token that may be chosen")
        return mask


def bits_of(token_ids: Collection[int], vocab_size: int) -> Mask:
    """A mask of these; ids beyond the vocabulary are left out."""
    mask = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
    for token in token_ids:
        if token < vocab_size:
            mask[token // 32] |= np.uint32(1 << token % 32)
    return mask


def full(vocab_size: int) -> Mask:
    """A mask of all tokens."""
    mask = np.full(-(-vocab_size // 32), 0xFFFFFFFF, dtype=np.uint32)
    if vocab_size % 32:
        mask[-1] = (1 << vocab_size % 32) - 1
    return mask
