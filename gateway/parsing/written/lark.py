"""A grammar in the making: rules and terminals by what they are, and literals that may be tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

from microserve.gateway.parsing.written.frame import Text

ANY = "/(?s:.*)/"
SOME = "/(?s:.+)/"
_SLASH = re.compile(r"\\.|/", re.DOTALL)


class Unwritable(ValueError):
    """What a schema asks for that a family's calls have no way to keep."""

    tool: str = ""
    """Whose schema it is."""


class NoValue(Unwritable):
    """Nothing fits it."""


class Rules:
    """Each text of a rule is there once."""

    def __init__(self, marks: Mapping[str, int]) -> None:
        """``marks``: ids of markers that are tokens."""
        self._marks = marks
        self._named: dict[str, str] = {}
        self._lines: list[str] = []

    def rule(self, body: str) -> str:
        return self._name("r", body)

    def terminal(self, body: str) -> str:
        return self._name("T", body)

    def recursive(self, make: Callable[[str], str]) -> str:
        """A rule whose text may have its name in it."""
        name = f"r{len(self._lines)}"
        self._lines.append("")
        at = len(self._lines) - 1
        self._lines[at] = f"{name}: {make(name)}"
        return name

    @property
    def lines(self) -> Sequence[str]:
        return self._lines

    def _name(self, kind: str, body: str) -> str:
        key = f"{kind}: {body}"
        if key not in self._named:
            self._named[key] = f"{kind}{len(self._lines)}"
            self._lines.append(f"{self._named[key]}: {body}")
        return self._named[key]

    def parts(self, text: str) -> list[tuple[str, int | None]]:
        """Texts, and tokens with their ids."""
        found: list[tuple[str, int | None]] = []
        while text:
            at, mark = min(
                ((at, mark) for mark in self._marks if (at := text.find(mark)) >= 0), default=(len(text), "")
            )
            if at:
                found.append((text[:at], None))
            if mark:
                found.append((mark, self._marks[mark]))
            text = text[at + len(mark) :]
        return found

    def terms(self, text: Text) -> str:
        """Of a literal; nothing of one that is empty."""
        options = [
            " ".join(map(_term, self.parts(each))) for each in ([text] if isinstance(text, str) else text)
        ]
        return options[0] if len(options) == 1 else f"({' | '.join(options)})"

    def closed(self, content: str, end: Text, *, may_be_empty: bool) -> str:
        """A text (a terminal's body that has no ``end`` in it), and ``end``. As one terminal, up to the first
        token of ``end``: a lexer that has taken the beginning of an end for content does not go back."""
        options = []
        for each in [end] if isinstance(end, str) else end:
            first, *rest = self.parts(each)
            rest_terms = " ".join(map(_term, rest))
            if first[1] is None:
                options.append(f"{self.terminal(f'({content}) {quoted(first[0])}')} {rest_terms}".rstrip())
            else:
                some = self.terminal(f"({content}) & {SOME}")
                options.append(
                    f"({some} |) {_term(first)} {rest_terms}".rstrip()
                    if may_be_empty
                    else f"{some} {_term(first)} {rest_terms}".rstrip()
                )
        options = list(dict.fromkeys(options))
        return options[0] if len(options) == 1 else f"({' | '.join(options)})"


def _term(part: tuple[str, int | None]) -> str:
    return quoted(part[0]) if part[1] is None else f"<[{part[1]}]>"


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def regex(pattern: str) -> str:
    body = _SLASH.sub(lambda found: r"\/" if found[0] in ("/", r"\/") else found[0], pattern)
    return f"/{body.replace(chr(10), chr(92) + 'n')}/"


def without(*banned: str) -> str:
    """Of a terminal: any text without these in it."""
    return f"{ANY} & ~({ANY} ({' | '.join(map(quoted, banned))}) {ANY})"
