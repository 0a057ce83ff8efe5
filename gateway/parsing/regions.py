"""An answer's text -> regions (text, thought, call), by markers that are literals.

Owns where a region begins and ends: the earliest marker counts, the longest of those that begin there, and
text that may yet become one is held back, so every cut of the text gives the same. A marker within a value is
a part of the value. Never raises. Knows no family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

SINK = "content"
"""Between all regions: what has no marker around it."""


class Markers:
    """What is looked for in one region."""

    def __init__(self, literals: Iterable[str]) -> None:
        self.literals = sorted(set(literals), key=len, reverse=True)
        self._find = re.compile("|".join(map(re.escape, self.literals))) if self.literals else None
        self._begins = {literal[0] for literal in self.literals}
        self._longest = max(map(len, self.literals), default=0)

    def search(self, text: str, *, is_all: bool) -> tuple[re.Match[str] | None, int]:
        """The first marker that is certain, and how much of the text is certainly before every other one."""
        if self._find is None:
            return None, len(text)
        found = self._find.search(text)
        held = len(text) if is_all else self._held(text)
        return (found, held) if found is not None and found.start() < held else (None, held)

    def _held(self, text: str) -> int:
        """Where the longest end of ``text`` begins that more text may make a marker, or a longer one."""
        for begin in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[begin] in self._begins:
                rest = text[begin:]
                if any(len(each) > len(rest) and each.startswith(rest) for each in self.literals):
                    return begin
        return len(text)


@dataclass(frozen=True, slots=True)
class Layout:
    """Which markers begin and end which region."""

    opens: Mapping[str, str]
    """The region that each literal begins."""
    watch: Mapping[str, Markers]
    """By region; of the sink: all that begin one, and those that mean nothing."""

    @classmethod
    def of(cls, regions: Mapping[str, tuple[Iterable[str], Iterable[str]]], stray: Iterable[str]) -> Layout:
        """``regions``: what begins and what ends each; ``stray``: markers that are none of the text."""
        opens = {literal: name for name, (literals, _) in regions.items() for literal in literals}
        watch = {name: Markers(closes) for name, (_, closes) in regions.items()}
        return cls(opens, {**watch, SINK: Markers([*opens, *stray])})


class Regions:
    """``push`` text, ``finish`` it."""

    def __init__(
        self,
        layout: Layout,
        *,
        is_open: Callable[[str], bool],
        on_text: Callable[[str, str], None],
        on_begin: Callable[[str, str], None],
        on_end: Callable[[str, str, bool], None],
        streamed: frozenset[str],
    ) -> None:
        """Text goes to ``on_text(region, text)`` as it comes, that of regions that are not ``streamed`` as a
        whole to ``on_end(region, text, is_whole)``, too; ``on_begin(region, marker)`` is told of each.
        ``is_open(region)``: does a value go on behind the text so far, so that a marker is none?"""
        self.region = SINK
        self._layout = layout
        self._is_open = is_open
        self._on_text, self._on_begin, self._on_end = on_text, on_begin, on_end
        self._streamed = streamed
        self._buffer = ""
        self._parts: list[str] = []

    def push(self, text: str) -> None:
        self._buffer += text
        self._read(is_all=False)

    def finish(self) -> None:
        """There is no more."""
        self._read(is_all=True)
        self._end(is_whole=False)

    def _read(self, *, is_all: bool) -> None:
        text, at = self._buffer, 0
        while True:
            found, held = self._layout.watch[self.region].search(text[at:] if at else text, is_all=is_all)
            if found is None:
                self._take(text[at : at + held])
                self._buffer = text[at + held :]
                return
            self._take(text[at : at + found.start()])
            at += found.end()
            self._mark(found[0])

    def _take(self, text: str) -> None:
        if not text:
            return
        self._on_text(self.region, text)
        if self.region not in self._streamed:
            self._parts.append(text)

    def _mark(self, marker: str) -> None:
        if self._is_open(self.region):
            self._take(marker)
            return
        opened = self._layout.opens.get(marker) if self.region == SINK else None
        self._end(is_whole=True)
        if opened is not None:
            self.region = opened
            self._on_begin(opened, marker)

    def _end(self, *, is_whole: bool) -> None:
        region, self.region = self.region, SINK
        body, self._parts = "".join(self._parts), []
        self._on_end(region, body, is_whole)
