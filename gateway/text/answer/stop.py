"""Stop strings, matched on text and across token borders.

Owns the text that may still become a stop string; knows nothing of tokens. The match is the stop string that
is *complete* first, the longest of those that end at the same character, so the visible text depends on the
text alone and never on how it was cut into tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class _Pattern:
    """Knuth-Morris-Pratt automaton of one stop string."""

    __slots__ = ("failure", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        """Length of the longest prefix of ``text`` that the input ends with."""
        self.failure = [0] * len(text)
        length = 0
        for i in range(1, len(text)):
            while length and text[i] != text[length]:
                length = self.failure[length - 1]
            if text[i] == text[length]:
                length += 1
            self.failure[i] = length

    @property
    def open_length(self) -> int:
        """``matched`` without a whole match: of what may yet become one."""
        return self.failure[-1] if self.matched == len(self.text) else self.matched

    def advance(self, character: str) -> int:
        """Take one character; the new ``matched``."""
        length = self.matched
        if length == len(self.text):
            length = self.failure[-1]
        while length and self.text[length] != character:
            length = self.failure[length - 1]
        if self.text[length] == character:
            length += 1
        self.matched = length
        return length


class StopMatcher:
    """Watches one choice's text for stop strings (at least one, none empty)."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """``include``: the stop string that ends the text is the last of it."""
        self._include = include
        self._patterns = [_Pattern(stop) for stop in stops]
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found."""

    @property
    def stopped(self) -> bool:
        return self.matched is not None

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """Text that is certainly visible now; empty after a match (``stopped``).

        Without ``may_stop`` what is complete in ``text`` is no match; what only begins in it may become one.
        """
        if self.stopped:
            return ""
        if not self._held and self._first_characters.isdisjoint(text):
            return text
        pending = self._held + text
        position = len(self._held)
        for character in text:
            position += 1
            complete = 0
            for pattern in self._patterns:
                if pattern.advance(character) == len(pattern.text):
                    complete = max(complete, len(pattern.text))
            if complete and may_stop:
                self.matched = pending[position - complete : position]
                self._held = ""
                return pending[: position if self._include else position - complete]
        longest = max(pattern.open_length for pattern in self._patterns)
        border = len(pending) - longest
        self._held = pending[border:]
        return pending[:border]

    def flush(self) -> str:
        """The end without a match: what was held back is visible after all."""
        held, self._held = self._held, ""
        return held
