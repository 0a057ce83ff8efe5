"""Token ids of one choice -> text, as it grows; never half a character.

Owns the ids whose text is not out yet. Knows nothing of stop strings. Pieces joined with the final flush are
what ``tokenizer.decode`` makes of all the ids together (special tokens skipped).
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

CONTEXT_TOKENS = 5
"""Prompt tokens that the first output token is decoded after: some decoders drop a space at a start."""

MAX_HELD_TOKENS = 64
"""A character has at most four tokens; a model that emits only broken bytes must not slow every step."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """One choice's decoding state."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        context = list(prompt_ids[-CONTEXT_TOKENS:])
        before = tokenizer.decode(context)
        if not before or before.endswith(REPLACEMENT):
            # After half a character the stream would hand out the prompt's text as well.
            context = []
        self._window = context
        """Ids whose text is out and after which the held ones are decoded."""
        self._held: list[int] = []
        self._stream = DecodeStream(ids=context, skip_special_tokens=True)

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that ``token_ids`` completes; empty while a character is incomplete."""
        text = ""
        # One by one: stepped as a list, half a character at the end would hold back everything before it.
        for token_id in token_ids:
            self._held.append(token_id)
            try:
                piece = self._stream.step(self._tokenizer, token_id)
            except Exception:  # tokenizers raises nothing narrower
                # The text so far was reinterpreted (a decoder that is no plain concatenation): start anew.
                text += self._restart()
                continue
            if piece is not None:
                text += piece
                self._window, self._held = self._held, []
            elif len(self._held) >= MAX_HELD_TOKENS:
                text += self._restart()
        return text

    def flush(self) -> str:
        """The text of what is held, half a character as U+FFFD. Nothing may be pushed after it."""
        text, self._held = self._rest(), []
        return text

    def _rest(self) -> str:
        if not self._held:
            return ""
        before = self._tokenizer.decode(self._window)
        text = self._tokenizer.decode(self._window + self._held)
        return text[len(before) :] if text.startswith(before) else self._tokenizer.decode(self._held)

    def _restart(self) -> str:
        text = self._rest()
        if text:
            self._window = self._held[-CONTEXT_TOKENS:]
            if self._tokenizer.decode(self._window).endswith(REPLACEMENT):
                self._window = []
        self._held = []
        self._stream = DecodeStream(ids=self._window, skip_special_tokens=True)
        return text
