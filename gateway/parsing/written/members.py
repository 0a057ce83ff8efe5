"""What is in a map, as its schema says: names with their schemas, or any names with one. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from microserve.gateway.parsing.written.lark import Rules, Unwritable
from microserve.gateway.parsing.written.schema import SILENT, target_of

ANY_NAME = "/[A-Za-z_][A-Za-z0-9_.-]{0,63}/"
"""Of a map that names none."""
_KEPT = frozenset(("type", "properties", "required", "additionalProperties"))
_OF_OBJECTS = frozenset(
    {
        *("patternProperties", "propertyNames", "minProperties", "maxProperties", "dependentRequired"),
        *("dependentSchemas", "dependencies", "unevaluatedProperties", "enum", "const"),
        *("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "$dynamicRef", "$recursiveRef"),
    }
)


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    schema: Any
    is_required: bool


@dataclass(frozen=True, slots=True)
class Members:
    named: Sequence[Member] = ()
    """In the order of the schema."""
    others: Any = field(default=False)
    """The schema of whatever else there is, where none is named; False: nothing else."""


def members_of(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Members:
    """Of a schema of an object. Raises :class:`Unwritable`."""
    seen = set[str]()
    while "$ref" in schema:
        reference = schema["$ref"]
        target = target_of(reference, root)
        if reference in seen or set(schema) - SILENT - {"$ref", "type"} or not isinstance(target, dict):
            raise Unwritable("$ref beside other keywords, or to itself")
        seen.add(reference)
        schema = target
    found = [name for name in schema if name in _OF_OBJECTS]
    if found:
        raise Unwritable(found[0])
    properties = schema.get("properties", {})
    required = schema.get("required", [])
    rest = schema.get("additionalProperties", True)
    named = [Member(name, each, name in required) for name, each in properties.items()]
    named += [Member(name, rest, True) for name in required if name not in properties]
    named = [each for each in named if each.schema is not False or each.is_required]
    return Members(named, False if named else rest)


def in_row(rules: Rules, members: Sequence[tuple[str, bool]], comma: str = "") -> str:
    """Terms of members in their order (their own terms, and whether they must be there), with ``comma``
    between two of them."""
    if not comma:
        return " ".join(term if is_required else f"({term})?" for term, is_required in members)
    tail = head = ""
    for term, is_required in reversed(members):
        begun = f"{term} {tail}".strip()
        head = begun if is_required else rules.rule(f"{begun} | {head}")
        more = f"{comma} {term}" if is_required else f"({comma} {term})?"
        tail = rules.rule(f"{more} {tail}".strip())
    return head


def any_number(term: str, comma: str = "", least: int = 0, most: int | None = None) -> str:
    """Of what is alike, with ``comma`` between two."""
    if most == 0:
        return ""
    first = max(least - 1, 0)
    more = "" if most == 1 else f" ({comma} {term}){{{first},{'' if most is None else most - 1}}}"
    return f"{term}{more}" if least else f"({term}{more})?"
