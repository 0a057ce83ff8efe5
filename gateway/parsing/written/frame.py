"""What a family writes around names and arguments, where calls are made to be. Literals only.

Where a field may be several texts, any of them may be written: releases of a family differ in these, and a
model knows its own.
"""

from __future__ import annotations

from dataclasses import dataclass

Text = str | tuple[str, ...]
"""One, or any of several."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Arguments one behind the other: a text as it is, any other value in JSON."""

    key: Text
    """Before a name."""
    text: Text
    """Between a name and a text."""
    json: Text
    """The same of any other value; ``{kind}`` is its type."""
    end: Text
    gap: Text
    """Behind ``end``."""
    banned: str
    """What a text must not have in it, for it would end there."""
    not_in_names: str
    """Characters."""
    is_escaped: bool = False
    """Names are written as in an attribute of HTML."""

    @property
    def is_told(self) -> bool:
        """Does each value say whether it is a text? Else its schema does."""
        return self.text != self.json


@dataclass(frozen=True, slots=True)
class Gemma:
    """A map in a notation of its own: texts between marks, names without."""

    quote: str


@dataclass(frozen=True, slots=True)
class Frame:
    """In the order of writing: lead, tail, before, calls, after; of each call: name, arguments, end."""

    name: Text
    """Before a name; with what follows, these stand around one call."""
    arguments: Text
    end: Text = ""
    between: Text | None = None
    """Between two calls; None: there is one call at most."""
    before: Text = ""
    after: Text = ""
    needs: tuple[str, ...] = ()
    """Tokens without which a model of the family does not write so."""
    parameters: Parameters | Gemma | None = None
    """None: arguments are JSON."""
    numbered: str = ""
    """Then this and a number come between a name and ``arguments``."""
    lead: Text = ""
    tail: Text = ""
    """Around an answer's text, whether there is any or not."""
