"""A text that comes in pieces, cut where Markdown may be drawn: at blank lines, but not within a fence.
Pure."""

from __future__ import annotations

import re

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


class Blocks:
    def __init__(self) -> None:
        self._rest = ""
        self._looked_at = 0
        """Characters of the rest whose lines have been seen."""
        self._fence = ""

    def push(self, text: str) -> list[str]:
        """The blocks that are whole now. All blocks and :meth:`rest` joined are the text."""
        self._rest += text
        found = []
        while (end := self._rest.find("\n", self._looked_at)) >= 0:
            line = self._rest[self._looked_at : end]
            self._looked_at = end + 1
            fence = _FENCE.match(line)
            if self._fence:
                closes = fence is not None and fence[1].startswith(self._fence) and not line.strip(" `~")
                self._fence = "" if closes else self._fence
            elif fence is not None:
                self._fence = fence[1]
            elif not line.strip():
                found.append(self._rest[: self._looked_at])
                self._rest, self._looked_at = self._rest[self._looked_at :], 0
        return found

    def rest(self) -> str:
        """What is left, whole or not."""
        rest, self._rest, self._looked_at, self._fence = self._rest, "", 0, ""
        return rest
