"""Does a value go on where a marker stands? Then the marker is a part of it, and ends nothing.

Owns what is remembered of a text as it grows: each piece is looked at once. Knows notations of values (JSON,
marks around a value), no family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from microserve.gateway.parsing.typed import Types

_IN_STRING = re.compile(r'["\\]')


class Openness(Protocol):
    def feed(self, text: str) -> None:
        """More of the text."""

    @property
    def is_open(self) -> bool:
        """Is its end within a value?"""


class Strings:
    """Of a JSON text: is a string open?"""

    def __init__(self) -> None:
        self.is_open = False
        self._is_escape = False

    def feed(self, text: str) -> None:
        at = 1 if self._is_escape and text else 0
        self._is_escape = self._is_escape and not text
        while True:
            if not self.is_open:
                at = text.find('"', at) + 1
                if not at:
                    return
                self.is_open = True
            found = _IN_STRING.search(text, at)
            if found is None:
                return
            at = found.end()
            if found[0] == '"':
                self.is_open = False
            elif at == len(text):
                self._is_escape = True
                return
            else:
                at += 1


@dataclass(frozen=True, slots=True)
class Value:
    """Marks around a value."""

    begin: str
    end: str
    is_json: bool | Callable[[str, str, Mapping[str, Types]], bool] = False
    """Then an ``end`` within a string is none. Where the schema decides: by the text before the first value,
    that before this one, and the types."""


class Values:
    """Of values between marks."""

    def __init__(self, values: Sequence[Value], types: Mapping[str, Types]) -> None:
        self._types = types
        self._by_begin = {each.begin: each for each in values}
        self._begins = re.compile("|".join(re.escape(each.begin) for each in values))
        self._longest = max(len(mark) for each in values for mark in (each.begin, each.end))
        self._value: Value | None = None
        self._strings: Strings | None = None
        self._first: str | None = None
        self._before: list[str] = []
        self._rest = ""

    @property
    def is_open(self) -> bool:
        return self._value is not None

    def feed(self, text: str) -> None:
        text, at = self._rest + text, 0
        while True:
            at, more = self._next(text, at)
            if not more:
                break
        keep = max(at, len(text) - self._longest + 1)
        self._skip(text[at:keep])
        self._rest = text[keep:]

    def _next(self, text: str, at: int) -> tuple[int, bool]:
        """Where the next mark ends, if there is one."""
        if self._value is None:
            begun = self._begins.search(text, at)
            if begun is None:
                return at, False
            self._before.append(text[at : begun.start()])
            self._begin(self._by_begin[begun[0]])
            return begun.end(), True
        mark = self._value.end
        end = text.find(mark, at)
        if end < 0:
            return at, False
        self._skip(text[at:end])
        if self._strings is not None and self._strings.is_open:
            self._skip(mark)
        else:
            self._value = self._strings = None
        return end + len(mark), True

    def _begin(self, value: Value) -> None:
        before = "".join(self._before)
        self._before.clear()
        if self._first is None:
            self._first = before
        is_json = value.is_json
        if callable(is_json):
            is_json = is_json(self._first, before, self._types)
        self._value, self._strings = value, Strings() if is_json else None

    def _skip(self, text: str) -> None:
        if self._value is None:
            self._before.append(text)
        elif self._strings is not None:
            self._strings.feed(text)
