"""A grammar -> the one that engines are sent, and what it no longer asks for; or the keyword that is refused.

Owns what is relaxed where a client does not insist (``strict``): a ``oneOf`` whose branches may overlap is an
``anyOf``, a ``format`` that nobody knows is left out. Everything else that cannot be enforced is refused.
Runs in a helper: it compiles.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from microserve.protocol.errors import InvalidRequest
from microserve.protocol.grammar.bounds import pointer, schema_of, schemas_in
from microserve.protocol.grammar.compiled import compile_grammar
from microserve.protocol.messages.request.sampling import Grammar

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_RELAXED = 8
"""Formats of different names that are left out of one schema."""

_UNKNOWN_FORMAT = re.compile(r"Unknown format: (.*)")
_UNIMPLEMENTED = re.compile(r"Unimplemented keys: (\[.*\])")
_TYPE = re.compile(r"Invalid type: (.*)")


def checked(tokenizer: LLTokenizer, grammar: Grammar, *, is_strict: bool) -> tuple[Grammar, list[str]]:
    """What can be enforced, and in words what was relaxed. Raises :class:`InvalidRequest`."""
    warnings: list[str] = []
    if grammar.kind == "lark":
        grammar = msgspec.structs.replace(grammar, text=_as_lark(grammar.text))
    while True:
        try:
            compile_grammar(tokenizer, grammar)
            return grammar, warnings
        except InvalidRequest as error:
            if grammar.kind != "json_schema":
                raise
            schema = schema_of(grammar.text)
            warning = None if is_strict or len(warnings) >= MAX_RELAXED else relax(schema, error.detail)
            if warning is None:
                raise InvalidRequest(located(schema, error.detail), field="grammar") from None
            warnings.append(warning)
            grammar = msgspec.structs.replace(grammar, text=msgspec.json.encode(schema).decode())


def relax(schema: dict[str, Any], fault: str) -> str | None:
    """Take out of the schema, in place, what the fault is about, and say so; None where that must not be."""
    if fault.startswith("oneOf constraints"):
        found = [each for path, each in schemas_in(schema) if "oneOf" in each]
        if not found or any("anyOf" in each for each in found):
            return None
        where = _first(schema, lambda each: "oneOf" in each)
        for each in found:
            each["anyOf"] = each.pop("oneOf")
        return f"oneOf at {where} is enforced as anyOf"
    if match := _UNKNOWN_FORMAT.match(fault):
        name = match[1]
        where = _first(schema, lambda each: each.get("format") == name)
        found = [each for _, each in schemas_in(schema) if each.get("format") == name]
        for each in found:
            del each["format"]
        return f"format {name[:64]!r} at {where} is not enforced" if found else None
    return None


def located(schema: dict[str, Any], fault: str) -> str:
    """The fault with the place of the keyword that it is about, where that is to be found."""
    if match := _UNIMPLEMENTED.match(fault):
        names = msgspec.json.decode(match[1], type=list[str])
        where = _first(schema, lambda each: names[0] in each)
        return f"{', '.join(names)} at {where} cannot be enforced"
    if fault.startswith("oneOf constraints"):
        where = _first(schema, lambda each: "oneOf" in each)
        return f"oneOf at {where} cannot be enforced: its branches may overlap"
    for pattern, keyword in ((_UNKNOWN_FORMAT, "format"), (_TYPE, "type")):
        if match := pattern.match(fault):
            value = match[1]
            return f"{keyword} at {_first(schema, lambda each: each.get(keyword) == value)}: {fault}"  # noqa: B023
    return fault


def _first(schema: dict[str, Any], is_it: Callable[[dict[str, Any]], bool]) -> str:
    return next((pointer(path) for path, each in schemas_in(schema) if is_it(each)), "#")


def _as_lark(text: str) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(text))
    except Exception as error:  # whatever a converter trips over in a text that is no grammar
        raise InvalidRequest(f"the grammar cannot be read: {error}"[:512], field="grammar") from None
