"""What a value is that a model has written without its type: as the tool's schema says.

Owns what a schema tells of types. Pure; of bounded time, whatever a client's schema is.
"""

from __future__ import annotations

import ast
import json
import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

MAX_LITERAL_CHARS = 1 << 16
"""Of a value in Python's notation; beyond it is text."""
MAX_BRANCHES = 1000
"""Of a parameter's schema, those behind references counted; more of them say nothing."""
Types = Mapping[str, Mapping[str, Any]]
"""The schema of each parameter, by tool and name."""
REFERENCES = ("$defs", "definitions")
"""Where schemas are that others refer to."""


def fail(why: str) -> Any:
    raise ValueError(why)


def _number(text: str) -> float:
    """One that is too large is the largest there is: JSON has no infinity to hand on."""
    value = float(text)
    return value if math.isfinite(value) else math.copysign(sys.float_info.max, value)


decoder = json.JSONDecoder(parse_constant=lambda name: fail(f"{name} is no JSON"), parse_float=_number)


def loaded(text: str) -> Any:
    value, end = decoder.raw_decode(text, behind_space(text, 0))
    return value if behind_space(text, end) == len(text) else fail("more than one value")


def behind_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def schemas_of(parameters: Mapping[str, Any] | None) -> Types:
    """Of each property, with what it refers to in its place as far as its type goes."""
    root = parameters or {}
    properties = root.get("properties")
    if not isinstance(properties, dict):
        return {}
    return {name: resolved(schema, root) for name, schema in properties.items()}


def resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """Branches of branches become branches; a schema without references is as it was."""
    if not isinstance(schema, dict) or not schema.keys() & {"$ref", "anyOf", "oneOf", "allOf"}:
        return schema
    found: list[Any] = []
    waiting, seen = [schema], set[str]()
    while waiting and len(found) < MAX_BRANCHES:
        each = waiting.pop(0)
        if not isinstance(each, dict):
            continue
        pointed = each.get("$ref")
        if isinstance(pointed, str):
            if pointed not in seen:
                seen.add(pointed)
                waiting.insert(0, referred(pointed, root))
            continue
        branches = each.get("anyOf", each.get("oneOf"))
        only = each.get("allOf")
        if "type" not in each and isinstance(branches, list):
            waiting[:0] = branches[:MAX_BRANCHES]
        elif "type" not in each and isinstance(only, list) and len(only) == 1:
            waiting.insert(0, only[0])
        else:
            found.append(each)
    return found[0] if len(found) == 1 else {"anyOf": found}


def referred(pointed: str, root: Mapping[str, Any]) -> Any:
    """What ``#/$defs/name`` and the like stand for; None for what is none of these."""
    for place in REFERENCES:
        name = pointed.removeprefix(f"#/{place}/")
        known = root.get(place)
        if name != pointed and isinstance(known, dict):
            return known.get(name.replace("~1", "/").replace("~0", "~"))
    return None


def is_text(schema: Any) -> bool:
    """May the value be a text, written as it is?"""
    return "string" in _kinds(schema)


def typed(text: str, schema: Any) -> Any:
    """A value that is written without its type, as the tool's schema says; what fits no type is text."""
    kinds = _kinds(schema)
    if not kinds:
        try:
            return loaded(text)
        except (ValueError, RecursionError):
            return text
    word = text.strip()
    if "null" in kinds and word in ("null", "None"):
        return None
    if "boolean" in kinds and word.lower() in ("true", "false"):
        return word.lower() == "true"
    wanted = {"integer": int, "number": (int, float), "object": dict, "array": list}
    found = list[Any]()
    for read in (loaded, _literal):  # once, of however many kinds a client's schema is
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found.append(read(word))
    for kind in dict.fromkeys(kinds):
        if kind in wanted:
            for each in found:
                is_whole = kind == "integer" and isinstance(each, float) and each.is_integer()
                value = int(each) if is_whole else each
                if isinstance(value, wanted[kind]) and not isinstance(value, bool):  # type: ignore[arg-type]
                    return value
    return text


def _literal(text: str) -> Any:
    return ast.literal_eval(text) if len(text) <= MAX_LITERAL_CHARS else fail("too long")


def _kinds(schema: Any) -> list[str]:
    if not isinstance(schema, dict):
        return []
    kind = schema.get("type")
    found = [kind] if isinstance(kind, str) else [each for each in kind or [] if isinstance(each, str)]
    for name in ("anyOf", "oneOf"):
        for each in schema.get(name) or []:
            found += _kinds(each)
    if not found:
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        found = list(dict.fromkeys(map(kind_of, values if isinstance(values, list) else [])))
    return found


def kind_of(value: Any) -> str:
    """The type of JSON that a value is of."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    names = {int: "integer", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "string")
