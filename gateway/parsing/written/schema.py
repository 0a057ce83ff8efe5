"""What a value may be, as two parts: texts, and everything else. Pure functions over JSON Schema.

Owns which keywords can be kept of a text that is written as it is. References are followed to ``$defs`` and
``definitions``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from microserve.gateway.parsing.typed import MAX_BRANCHES, REFERENCES, kind_of, referred
from microserve.gateway.parsing.written.formats import FORMATS
from microserve.gateway.parsing.written.lark import ANY, NoValue, Unwritable, quoted, regex
from microserve.protocol.grammar.bounds import schemas_in
from microserve.protocol.grammar.compiled import ANNOTATIONS, json_of

KINDS = ("null", "boolean", "integer", "number", "array", "object")
"""Of values that are no text."""
OF_STRINGS = ("pattern", "minLength", "maxLength", "format")
OF_TEXT = ("enum", "const", *OF_STRINGS)
SILENT = frozenset((*ANNOTATIONS, "$schema", "$id", *REFERENCES))
"""Keywords that ask for nothing."""
_COMPOUND = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "$ref", "$dynamicRef", "$recursiveRef")


@dataclass(slots=True)
class Parts:
    """The value is one of these."""

    texts: list[dict[str, Any]] = field(default_factory=list)
    others: list[dict[str, Any]] = field(default_factory=list)


def parts_of(schema: Any, root: Mapping[str, Any]) -> Parts:
    """Raises :class:`Unwritable`."""
    parts = Parts()
    waiting, seen = [schema], set[str]()
    for _ in range(MAX_BRANCHES):
        if not waiting:
            return parts
        each = waiting.pop(0)
        if each is True:
            each = {}
        if not isinstance(each, dict):
            raise Unwritable(f"a schema that is {each!r}")
        asked = {name: value for name, value in each.items() if name not in SILENT}
        compound = [name for name in _COMPOUND if name in asked]
        if not compound:
            _divide(asked, parts)
        elif len(asked) > 1 or len(compound) > 1:
            if not _no_text(asked):
                raise Unwritable(f"{compound[0]} beside other keywords")
            parts.others.append(asked)
        elif compound == ["$ref"]:
            if asked["$ref"] in seen:
                continue  # what it stands for is among the parts
            seen.add(asked["$ref"])
            waiting.insert(0, target_of(asked["$ref"], root))
        elif compound[0] in ("anyOf", "oneOf", "allOf"):
            branches = asked[compound[0]]
            if compound == ["allOf"] and len(branches) != 1:
                raise Unwritable("allOf of several")
            waiting[:0] = branches
        else:
            raise Unwritable(compound[0])
    raise Unwritable(f"more than {MAX_BRANCHES} branches")


def target_of(reference: str, root: Mapping[str, Any]) -> Any:
    target = referred(reference, root)
    if target is None:
        raise Unwritable(f"$ref {reference!r}, which is not one to $defs or definitions")
    return target


def _no_text(asked: dict[str, Any]) -> bool:
    kinds = asked.get("type")
    return kinds is not None and "string" not in ([kinds] if isinstance(kinds, str) else kinds)


def _divide(asked: dict[str, Any], parts: Parts) -> None:
    """A schema of no branches."""
    asked_kinds: str | list[str] | tuple[str, ...] = asked.get("type", ("string", *KINDS))
    kinds = [asked_kinds] if isinstance(asked_kinds, str) else list(asked_kinds)
    values: list[Any] | None = asked.get("enum")
    if values is None and "const" in asked:
        values = [asked["const"]]
    if "string" in kinds and (values is None or any(isinstance(each, str) for each in values)):
        parts.texts.append({name: value for name, value in asked.items() if name in OF_TEXT})
    others = [kind for kind in kinds if kind != "string"]
    if not others or (values is not None and all(isinstance(each, str) for each in values)):
        return
    rest = {name: value for name, value in asked.items() if name not in OF_STRINGS}
    if "enum" in rest:
        rest["enum"] = [each for each in rest["enum"] if not isinstance(each, str)]
    if ("const" not in rest and "enum" not in rest) or "type" in asked:
        rest["type"] = others if len(others) > 1 else others[0]
    parts.others.append(rest)


def is_any(schema: dict[str, Any], kinds: tuple[str, ...] = KINDS) -> bool:
    """Is nothing asked of a value but its type, one of these?"""
    found = schema.get("type")
    asked = [found] if isinstance(found, str) else found or []
    return schema.keys() == {"type"} and all(each in kinds for each in asked)


def kinds_in(schemas: list[dict[str, Any]]) -> list[str]:
    """Types of JSON that values may be, once each."""
    found: dict[str, None] = {}
    for each in schemas:
        kinds: Any = each.get("type")
        if kinds is None:
            values: list[Any] = each.get("enum") or [each.get("const")]
            kinds = [kind_of(value) for value in values]
        found |= dict.fromkeys([kinds] if isinstance(kinds, str) else kinds)
    return list(found)


def of_kind(schemas: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Those of one type of JSON; ``number`` has ``integer`` in it."""
    wanted = ("integer", "number") if kind == "number" else (kind,)
    found = []
    for each in schemas:
        asked = each.get("type", wanted)
        kinds = [one for one in ([asked] if isinstance(asked, str) else asked) if one in wanted]
        rest = {**each, "type": kinds if len(kinds) > 1 else kinds[0]} if kinds else {}
        if "const" in each or "enum" in each:
            values = [each["const"]] if "const" in each else each["enum"]
            values = [one for one in values if kind_of(one) in wanted]
            rest = {**rest, "enum": values} if kinds and values else {}
            rest.pop("const", None)
        if rest:
            found.append(rest)
    return found


def json_term(schemas: list[dict[str, Any]], root: Mapping[str, Any]) -> str:
    """A value of one of these, in JSON."""
    if not schemas:
        raise NoValue("a schema without a value")
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    if any("$ref" in each for _, each in schemas_in(schema)):
        reachable: dict[str, dict[str, Any]] = {}
        waiting = [schema]
        while waiting:
            for _, each in schemas_in(waiting.pop()):
                reference = each.get("$ref")
                if not isinstance(reference, str):
                    continue
                target = target_of(reference, root)
                place, name = reference.removeprefix("#/").split("/", 1)
                key = name.replace("~1", "/").replace("~0", "~")
                if key not in reachable.setdefault(place, {}):
                    reachable[place][key] = target
                    waiting.append(target if isinstance(target, dict) else {})
        schema = {**schema, **reachable}
    return json_of(schema)


def text_term(schema: dict[str, Any], banned: str) -> tuple[str, bool]:
    """A terminal's body for a text without ``banned`` in it, and whether it may be empty."""
    parts, may_be_empty = list[str](), True
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is not None:
        texts = [each for each in values if isinstance(each, str)]
        if found := next((each for each in texts if banned in each), None):
            raise Unwritable(f"the text {found!r}, which has {banned!r} in it")
        parts.append(f"({' | '.join(map(quoted, texts))})")
        may_be_empty = "" in texts
    if "minLength" in schema or "maxLength" in schema:
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        parts.append(f"/(?s:.{{{int(least)},{most if most == '' else int(most)}}})/")
        may_be_empty = may_be_empty and least == 0
    if "pattern" in schema:
        body = whole(schema["pattern"])
        parts.append(body)
        may_be_empty = may_be_empty and least_chars(schema["pattern"]) == 0
    if "format" in schema:
        if schema["format"] not in FORMATS:
            raise Unwritable(f"format {schema['format']!r}")
        parts.append(regex(FORMATS[schema["format"]]))
        may_be_empty = False
    return " & ".join([*(parts or [ANY]), f"~({ANY} {quoted(banned)} {ANY})"]), may_be_empty


def least_chars(pattern: str) -> int:
    """Of a text in which it is found, as it is written. None is tried: that may take any time, in which the
    whole process stands still."""
    try:
        least: int = _parser.parse(pattern).getwidth()[0]
    except (re.error, RecursionError, OverflowError):
        raise Unwritable(f"pattern {pattern[:64]!r}") from None
    return least


_ASCII = {"d": "0-9", "w": "A-Za-z0-9_"}
_PART = re.compile(r"\\.|[\[\].]", re.DOTALL)


def whole(pattern: str) -> str:
    """A terminal's body for texts in which a pattern of JSON Schema is found."""
    least_chars(pattern)
    body = re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]", lambda found: "x" * len(found[0]), pattern, flags=re.DOTALL)
    begins, ends = body.startswith("^"), body.endswith("$")
    inner = body[begins : len(body) - ends]
    if "^" in inner or "$" in inner or ((begins or ends) and _alternates(inner)):
        raise Unwritable(f"pattern {pattern[:64]!r}: ^ and $ within it")
    bare = _as_ecma(pattern[begins : len(pattern) - ends])
    before, after = "" if begins else f"{ANY} ", "" if ends else f" {ANY}"
    return f"({before}{regex(f'(?:{bare})')}{after})" if bare else ANY if not (begins and ends) else '""'


def _as_ecma(pattern: str) -> str:
    """With classes of ASCII only, and a dot that is no end of a line, as JSON Schema has them: those of Lark
    know all of Unicode."""
    in_class = False

    def written(found: re.Match[str]) -> str:
        nonlocal in_class
        part = found[0]
        name = part[1:]
        if part in ("[", "]"):
            in_class = part == "["
        elif part == "." and not in_class:
            return r"[^\n\r\u2028\u2029]"
        elif name.lower() in _ASCII:
            inner = _ASCII[name.lower()]
            if in_class and name.isupper():
                raise Unwritable(f"pattern {pattern[:64]!r}: {part} within a class")
            return inner if in_class else f"[{'^' if name.isupper() else ''}{inner}]"
        return part

    return _PART.sub(written, pattern)


def _alternates(body: str) -> bool:
    """Is there a ``|`` outside of all groups?"""
    depth = 0
    for each in body:
        depth += (each == "(") - (each == ")")
        if each == "|" and not depth:
            return True
    return False
