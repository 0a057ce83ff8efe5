"""llguidance as a ``Matcher``, and what compiles one for a model: imported when a grammar first comes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from microserve.protocol.errors import InternalError, InvalidRequest
from microserve.protocol.grammar.compiled import compile_grammar, fault_of, load_tokenizer
from microserve.protocol.messages.request.sampling import Grammar
from microserve.services.engine.guidance.guide import Mask, bits_of

if TYPE_CHECKING:
    from llguidance import LLMatcher


class GrammarMatcher:
    """A ``Matcher``."""

    def __init__(self, inner: LLMatcher, not_ends: Mask) -> None:
        """``not_ends``: what the library takes for ends and the model does not, inverted."""
        self._inner = inner
        self._kept = not_ends

    def mask(self) -> Mask:
        mask = np.frombuffer(self._inner.compute_bitmask(), dtype=np.uint32)
        if (fault := fault_of(self._inner)) is not None:
            raise InvalidRequest(f"the grammar became too much: {fault}", field="grammar")
        return mask[: len(self._kept)] & self._kept  # it may have a word more than the vocabulary needs

    def may_end(self) -> bool:
        return self._inner.is_accepting()

    def take(self, token_id: int) -> None:
        if not self._inner.consume_token(token_id):
            raise InternalError(f"token {token_id} is not in the grammar here: {fault_of(self._inner)}")

    def fork(self) -> GrammarMatcher:
        return GrammarMatcher(self._inner.deep_copy(), self._kept)


class GrammarCompiler:
    """For one model. Slow, and safe to call from several threads."""

    def __init__(self, directory: Path, vocab_size: int, ends: frozenset[int]) -> None:
        """Raises :class:`InvalidRequest` for a model without a tokenizer that can be used."""
        self._tokenizer = load_tokenizer(directory, vocab_size, [each for each in ends if each < vocab_size])
        own = set(self._tokenizer.eos_tokens) - ends
        self._kept = ~bits_of(own, vocab_size)

    def compile(self, grammar: Grammar) -> GrammarMatcher:
        """A matcher at the grammar's begin, to be forked. Raises :class:`InvalidRequest`."""
        return GrammarMatcher(compile_grammar(self._tokenizer, grammar), self._kept)
