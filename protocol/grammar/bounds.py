"""What no grammar may be, told before a library sees it: too long, too deep, too many parts.

Owns the bounds, and the walk over a JSON schema that tells keywords from names of properties. Pure functions,
of time that grows with the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from microserve.protocol.errors import InvalidRequest
from microserve.protocol.messages.request.sampling import Grammar

MAX_SCHEMA_NBYTES = 64 << 10
MAX_SCHEMA_DEPTH = 64
"""Lists and maps within each other: 32 objects within each other."""
MAX_SCHEMA_ITEMS = 1000
"""Properties, definitions, values of enums and branches, together; and choices."""
MAX_REGEX_CHARS = 4096
"""Compiling takes memory by the square of it."""
MAX_LARK_LINES = 1000
"""A rule that is made of another one takes stack for each."""
MAX_LARK_LINE_CHARS = 16 << 10

NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose value maps names to schemas."""
DATA = frozenset({"enum", "const", "default", "examples", "x-guidance"})
"""Keywords whose value is no schema."""
COUNTED = ("enum", "anyOf", "oneOf", "allOf", "prefixItems", *sorted(NAMED))

Path = tuple[str | int, ...]


def check_bounds(grammar: Grammar) -> None:
    """Raises :class:`InvalidRequest` that says what is too much, or that a text is no JSON."""
    text = grammar.text
    match grammar.kind:
        case "json_schema":
            schema_of(text)
        case "choice":
            choices_of(text)
        case "regex" if len(text) > MAX_REGEX_CHARS:
            raise _refused(f"a regular expression may have {MAX_REGEX_CHARS} characters at most")
        case "lark":
            lines = text.splitlines()
            if len(lines) > MAX_LARK_LINES or max(map(len, lines), default=0) > MAX_LARK_LINE_CHARS:
                raise _refused(
                    f"a grammar may have {MAX_LARK_LINES} lines of {MAX_LARK_LINE_CHARS} characters at most"
                )


def choices_of(text: str) -> list[str]:
    """Raises :class:`InvalidRequest`."""
    try:
        choices = msgspec.json.decode(text, type=list[str])
    except msgspec.MsgspecError:
        raise _refused("choices must be a list of strings") from None
    if not choices or "" in choices:
        raise _refused("there must be choices, and none of them empty")
    if len(choices) > MAX_SCHEMA_ITEMS:
        raise _refused(f"there may be {MAX_SCHEMA_ITEMS} choices at most")
    return choices


def schema_of(text: str) -> dict[str, Any]:
    """The schema of a ``json_schema``. Raises :class:`InvalidRequest`."""
    if len(text.encode(errors="replace")) > MAX_SCHEMA_NBYTES:
        raise _refused(f"a schema may have {MAX_SCHEMA_NBYTES} bytes at most")
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _refused(f"the schema is not JSON: {error}") from None
    except RecursionError:
        raise _refused(f"a schema may be nested {MAX_SCHEMA_DEPTH} deep at most") from None
    if not isinstance(schema, dict):
        raise _refused("a schema must be an object")
    _check_depth(schema)
    items = 0
    for _, each in schemas_in(schema):
        items += sum(len(each[name]) for name in COUNTED if isinstance(each.get(name), dict | list))
    if items > MAX_SCHEMA_ITEMS:
        raise _refused(
            f"a schema may have {MAX_SCHEMA_ITEMS} properties, definitions, branches and enum values, "
            f"this one has {items}"
        )
    return schema


def schemas_in(schema: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every schema in it, itself first, and where it is."""
    waiting: list[tuple[Path, Any]] = [((), schema)]
    while waiting:
        path, each = waiting.pop()
        if isinstance(each, list):
            waiting += [((*path, index), item) for index, item in enumerate(each)]
        elif isinstance(each, dict):
            yield path, each
            for name, value in reversed(each.items()):
                if name in NAMED and isinstance(value, dict):
                    waiting += [((*path, name, key), item) for key, item in reversed(value.items())]
                elif name not in DATA:
                    waiting.append(((*path, name), value))


def pointer(path: Path) -> str:
    """``#/properties/a``: where in a schema, as JSON Schema writes it."""
    return "/".join(["#", *(str(part).replace("~", "~0").replace("/", "~1") for part in path)])


def _check_depth(schema: Any) -> None:
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise _refused(f"a schema may be nested {MAX_SCHEMA_DEPTH} deep at most")
        inner = [value for each in level for value in (each.values() if isinstance(each, dict) else each)]
        level = [value for value in inner if isinstance(value, dict | list)]


def _refused(detail: str) -> InvalidRequest:
    return InvalidRequest(detail, field="grammar")
