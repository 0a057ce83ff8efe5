"""What an answer must be, as it is asked for and not yet checked. Pure functions.

Owns how a schema, a regular expression, choices, a grammar and structural tags become one; each is given with
the field that it came by. Which fields there are is an API's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from microserve.protocol.errors import InvalidRequest, located
from microserve.protocol.grammar.bounds import check_bounds
from microserve.protocol.grammar.compiled import OPTIONS
from microserve.protocol.messages.request.sampling import Grammar


class Asked(msgspec.Struct, frozen=True, omit_defaults=True):
    grammar: Grammar
    field: str
    """By which it was asked for, as the client wrote it."""
    is_strict: bool = False
    """Nothing may be relaxed."""


def one_of(wishes: Sequence[Asked]) -> Asked | None:
    """None: the answer may be anything. Raises :class:`InvalidRequest` for two."""
    if len(wishes) > 1:
        raise InvalidRequest(
            f"{wishes[0].field} and {wishes[1].field} exclude each other", field=wishes[1].field
        )
    return wishes[0] if wishes else None


def json_object(field: str) -> Asked:
    return Asked(Grammar(kind="json_object"), field)


def json_schema(field: str, schema: Any, *, is_strict: bool = False) -> Asked:
    """``schema``: an object, or its JSON, as vLLM takes it. Raises :class:`InvalidRequest`."""
    return Asked(Grammar(kind="json_schema", text=_schema_text(field, schema)), field, is_strict)


def text(kind: str, field: str, written: str) -> Asked:
    """Of the kinds ``regex`` and ``lark``; GBNF, as llama.cpp and xgrammar have it, becomes Lark when it is
    checked. Raises :class:`InvalidRequest`."""
    if not written:
        raise InvalidRequest(f"{field} is empty", field=field)
    return Asked(Grammar(kind=kind, text=written), field)


def choice(field: str, choices: Sequence[str]) -> Asked:
    return Asked(Grammar(kind="choice", text=msgspec.json.encode(choices).decode()), field)


def structural_tag(field: str, tag: Any) -> Asked:
    """``tag``: vLLM's ``{"structures": [{"begin", "schema", "end"}], "triggers"}``, or its JSON. Raises
    :class:`InvalidRequest`."""
    from llguidance import StructTag

    try:
        tags = msgspec.convert(_decoded(tag) if isinstance(tag, str) else tag, _StructuralTag)
    except msgspec.ValidationError as error:
        path, message = located(error)
        where = f"{field}.{path}" if path else field
        raise InvalidRequest(f"{where}: {message}", field=field) from None
    parts = []
    for each in tags.structures:
        trigger = next((one for one in tags.triggers if one and each.begin.startswith(one)), None)
        if trigger is None:
            raise InvalidRequest(f"{field}: no trigger begins {each.begin[:64]!r}", field=field)
        schema = _schema_text(field, each.schema)
        try:
            check_bounds(Grammar(kind="json_schema", text=schema))
        except InvalidRequest as error:
            raise InvalidRequest(f"{field}: {error.detail}", field=field) from None
        ruled = {**each.schema, "x-guidance": OPTIONS}
        parts.append(StructTag(trigger=trigger, begin=each.begin, grammar=ruled, end=each.end))
    return Asked(Grammar(kind="lark", text=StructTag.to_grammar(parts, assume_special=False)), field)


class _Structure(msgspec.Struct, forbid_unknown_fields=True):
    begin: str
    schema: dict[str, Any]
    end: str


class _StructuralTag(msgspec.Struct, forbid_unknown_fields=True):
    structures: list[_Structure]
    triggers: list[str]
    type: str = "structural_tag"

    def __post_init__(self) -> None:
        if not 0 < len(self.structures) <= 128:
            raise ValueError("there must be 1 to 128 structures")


def _schema_text(field: str, schema: Any) -> str:
    if isinstance(schema, str):
        schema = _decoded(schema)
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{field} must be an object", field=field)
    return msgspec.json.encode(schema).decode()


def _decoded(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
