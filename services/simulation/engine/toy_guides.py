"""Guides of a simulated engine: a grammar whose every state allows other tokens.

The state is a hash of the grammar's text and of all tokens since its begin, and what it allows is drawn from
that hash: a matcher that missed a token, saw one twice, or is another row's, allows other tokens, and the
answer shows it. Nothing is compiled; how long it takes is of the virtual clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from microserve.protocol.errors import InternalError, MeshError
from microserve.protocol.messages.request.sampling import Grammar, SamplingParams
from microserve.services.engine.guidance.guide import Guide, Mask, full

COMPILE_S = 0.003
"""Of every other grammar; the rest is there at once."""


class ToyMatcher:
    """A ``Matcher`` that allows half of the vocabulary, of at most 512 tokens, and never has to end."""

    def __init__(self, state: bytes, vocab_size: int) -> None:
        self._state, self._vocab_size = state, vocab_size

    def mask(self) -> Mask:
        drawn = hashlib.blake2b(self._state, digest_size=64).digest()
        vocabulary = full(self._vocab_size)
        return np.frombuffer(drawn, dtype=np.uint32)[: len(vocabulary)] & vocabulary

    def may_end(self) -> bool:
        return False

    def take(self, token_id: int) -> None:
        if not self.mask()[token_id // 32] >> token_id % 32 & 1:
            raise InternalError(f"token {token_id} is not in the grammar here")
        key = self._state + token_id.to_bytes(4, "little")
        self._state = hashlib.blake2b(key, digest_size=16).digest()

    def fork(self) -> ToyMatcher:
        return ToyMatcher(self._state, self._vocab_size)


class ToyGuiding:
    """A ``Guiding`` that is done when its time has come."""

    error: MeshError | None = None

    def __init__(self, guide: Guide, ready_at: float, clock: Callable[[], float]) -> None:
        self.guide: Guide | None = guide
        self._ready_at, self._clock = ready_at, clock

    @property
    def is_done(self) -> bool:
        return self._clock() >= self._ready_at

    def is_overdue(self, now: float) -> bool:
        return False

    def cancel(self) -> None: ...


class ToyGuides:
    """The ``Guides`` of one engine."""

    def __init__(self, vocab_size: int, clock: Callable[[], float]) -> None:
        self._vocab_size, self._clock = vocab_size, clock

    def prepare(
        self, params: SamplingParams, output: Sequence[int], ends: frozenset[int], on_done: Callable[[], None]
    ) -> ToyGuiding:
        guide = toy_guide(params, self._vocab_size)
        guide.follow(output)
        is_late = params.grammar is not None and len(params.grammar.text) % 2 == 0
        return ToyGuiding(guide, self._clock() + (COMPILE_S if is_late else 0.0), self._clock)

    def close(self) -> None: ...


def toy_guide(params: SamplingParams, vocab_size: int) -> Guide:
    """One at its begin. The last token of the vocabulary stands for the end that a guide must have."""
    grammar = params.grammar or Grammar(kind="regex")
    matcher = ToyMatcher(hashlib.blake2b(grammar.text.encode(), digest_size=16).digest(), vocab_size)
    return Guide(matcher, params, frozenset({vocab_size - 1}), vocab_size)
