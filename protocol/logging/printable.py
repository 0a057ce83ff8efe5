"""Text of others made fit for a terminal: what could command it is shown and not obeyed.

Owns the one rule: control characters (C0, DEL, C1), such as change direction or hide, and whatever else is
not printable become escapes. Knows nobody who prints.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec


def printable(text: object, *, keep: str = "") -> str:
    """``text`` on a terminal: ``\\x1b`` and ``\\u202e`` as they are written here; ``keep``: left as they
    are."""
    whole = str(text)
    if whole.isprintable():
        return whole
    return "".join(each if each.isprintable() or each in keep else _escape(each) for each in whole)


def _escape(character: str) -> str:
    number = ord(character)
    short = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(character)
    if short is not None:
        return short
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def printable_json(value: Any) -> str:
    """JSON in ASCII, which says the same and moves no cursor."""
    return json.dumps(msgspec.to_builtins(value), ensure_ascii=True, separators=(",", ":"))
