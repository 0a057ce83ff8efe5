"""What is said of a wrong setting: what would be right, what was given, and which name was meant.

Owns the words. Knows fields and their types, not where a value came from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.bounds import bound_in_words, fault_of_number
from microserve.protocol.settings.settings import SECRET_FIELDS, Settings

MAX_SHOWN_CHARS = 60
_UNITS = {"_s": "seconds", "_mb": "megabytes"}


def printable(value: object, *, max_chars: int = MAX_SHOWN_CHARS) -> str:
    """``value`` for a message: one line, nothing that a terminal obeys, not too long. Text in quotes only if
    it needs them."""
    if isinstance(value, str) and value.isprintable() and value.strip():
        text = value
    else:
        try:
            text = "true" if value is True else "false" if value is False else ascii(value)
        except ValueError:
            text = "a number of thousands of digits"
    return text if len(text) <= max_chars else f"{text[: max_chars - 3]}..."


def unknown_setting(path: str, *, spell: Callable[[str], str] = str) -> str:
    """What to say behind ``path``, which is no setting: the one that was meant, else those that there are."""
    if meant := _meant(path):
        return f", did you mean {spell(meant)}?"
    fields = _fields().get(path.partition(".")[0])
    if fields:
        return f"; there are {', '.join(fields)}"
    return f"; sections are {', '.join(_fields())}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``, did you mean KNOWN?``, or nothing where none is like ``name``."""
    near = get_close_matches(name[:100].lower().replace("-", "_"), list(known), n=1, cutoff=0.6)
    return f", did you mean {near[0]}?" if near else ""


def wrong_value(path: str, kind: Any, value: Any) -> str:
    """``PATH must be a number from 0 to 1, is 3``."""
    shown = "something else" if path in SECRET_FIELDS else _quoted(value)
    return f"{path} must be {in_words(path, kind)}, is {shown}"


def fault_of_value(path: str, kind: Any, value: Any) -> ConfigError | None:
    """What is wrong with ``value``, read from TOML or given as text, for the setting at ``path``."""
    if fault := fault_of_number(path, kind, value):
        return fault
    if place := _not_text(path, value):
        return ConfigError(f"{place} must be UTF-8 without zero characters", field=place)
    try:
        read = msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError:
        return ConfigError(wrong_value(path, kind, value), field=path)
    return fault_of_number(path, kind, read)


def in_words(path: str, kind: Any) -> str:
    """What the setting at ``path`` may be: ``a whole number above 0 (megabytes)``."""
    unit = next((f" ({word})" for suffix, word in _UNITS.items() if path.endswith(suffix)), "")
    bound = ""
    if get_origin(kind) is Annotated:
        bound = next((f" {text}" for each in get_args(kind) if (text := bound_in_words(each))), "")
        kind = get_args(kind)[0]
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(in_words(path, each) for each in arguments)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is int:
        return f"a whole number{bound}{unit}"
    if origin is float:
        return f"a number{bound}{unit}"
    if origin in (list, tuple):
        return f'a list ["...", ...] of {"texts" if arguments[:1] == (str,) else "values"}'
    if origin is dict:
        return "a table of tables ([section.name])" if get_origin(arguments[1]) is dict else "a table"
    return {bool: "true or false", str: "text", type(None): "nothing"}.get(origin, "another kind of value")


def _fields() -> dict[str, list[str]]:
    sections = msgspec.structs.fields(Settings)
    return {each.name: [field.name for field in msgspec.structs.fields(each.type)] for each in sections}


def _meant(path: str) -> str:
    """The setting, or the section, whose name is most like ``path``; empty if none is."""
    known = [f"{section}.{name}" for section, names in _fields().items() for name in names]
    squashed = {_squash(each): each for each in known}
    if same := squashed.get(_squash(path)):
        return same
    section, _, name = path.lower().replace("-", "_").rpartition(".")
    alike = [each for each in known if each.partition(".")[2] == name]  # the right name in a wrong section
    if alike:
        return (get_close_matches(f"{section}.{name}", alike, n=1, cutoff=0.0) or alike)[0]
    if near := get_close_matches(_squash(path), squashed, n=1, cutoff=0.75):
        return squashed[near[0]]
    own = [f"{section}.{each}" for each in _fields().get(section, [])]
    if near := get_close_matches(f"{section}.{name}", own, n=1, cutoff=0.75):
        return near[0]
    return "" if section else next(iter(get_close_matches(name, list(_fields()), n=1, cutoff=0.6)), "")


def _squash(path: str) -> str:
    return re.sub(r"[^a-z0-9]", "", path.lower())


def _not_text(path: str, value: Any) -> str:
    """Where in ``value`` there is text that no message and no file name can hold; empty: nowhere."""
    if isinstance(value, str):
        return path if "\0" in value or any("\ud800" <= each <= "\udfff" for each in value) else ""
    if isinstance(value, dict):
        inner = [(f"{path}.{printable(name)}", part) for name, each in value.items() for part in (name, each)]
    elif isinstance(value, list):
        inner = [(path, each) for each in value]
    else:
        return ""
    return next(filter(None, (_not_text(place, each) for place, each in inner)), "")


def _quoted(value: Any) -> str:
    shown = printable(value)
    return f"'{shown}'" if isinstance(value, str) and not shown.startswith("'") else shown
