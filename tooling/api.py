"""The generated parts of docs/api.md: every field of every body, and what OpenAI's client is tried with.

    python tooling/api.py           print whether the page is as the code says; exit code 1 if it is not
    python tooling/api.py --write   make it so

A field's row is made of its type (``/openapi.json`` is made of the same), what is said of it below, and the
comment above its group. Needs this checkout installed, with what its tests need.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import msgspec

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / ".src"), str(ROOT)]

from microserve.gateway.document import OPERATIONS  # noqa: E402

PAGE = ROOT / "docs/api.md"
PROBES = "tests.gateway.probes"
ROOMS = {
    "chat": "Conversations",
    "tools": "Tools",
    "structured": "Structured output",
    "completions": "Completions",
    "responses": "Responses",
    "elsewhere": "The client, models, and what there is not",
}
REF = "#/$defs/{name}"
Struct = type[msgspec.Struct]


def page(text: str) -> str:
    """The page with its generated parts as the code says."""
    for name, made in (("fields", fields()), ("probes", probes())):
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        text = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}{made}{end}", text, flags=re.DOTALL)  # noqa: B023
    return text


def probes() -> str:
    parts = []
    for room in ROOMS:  # each lists its own when it is imported
        import_module(f"{PROBES}.{room}")
    found = import_module(f"{PROBES}.probe").PROBES
    for room, title in ROOMS.items():
        rows = "".join(f"| {_cell(each.what)} | {each.outcome} |\n" for each in found if each.room == room)
        parts.append(f"| {title} | outcome |\n|---|---|\n{rows}")
    return "\n".join(parts)


def fields() -> str:
    parts = []
    for kind, place in _kinds().items():
        rows = "".join(_rows(kind))
        if rows:
            parts.append(f"### {place}\n\n| field | is | what becomes of it |\n|---|---|---|\n{rows}")
    return "\n".join(parts)


def _kinds() -> dict[Struct, str]:
    """Every type of which a body is made, and where it stands: those of whole bodies first."""
    bodies = [each.request for each in OPERATIONS if each.request is not None]
    paths: dict[Struct, list[str]] = {}
    for operation in OPERATIONS:
        for kind in _lineage(operation.request):
            paths.setdefault(kind, []).append(f"`{operation.path}`")
    found = {kind: ", ".join(places) for kind, places in paths.items()}
    for body in bodies:
        for kind, field in _within(body, set()):
            found.setdefault(kind, f"`{kind.__name__}`: `{field}`")
    return found


def _lineage(kind: Struct | None) -> list[Struct]:
    """The type and those that it is made of, the most general one first."""
    if kind is None:
        return []
    return [
        each for each in reversed(kind.__mro__) if issubclass(each, msgspec.Struct) and each.__annotations__
    ]


def _within(kind: Struct, seen: set[Struct]) -> Iterator[tuple[Struct, str]]:
    for field in msgspec.structs.fields(kind):
        for inner in _structs(field.type):
            if inner not in seen:
                seen.add(inner)
                yield inner, field.name
                yield from _within(inner, seen)


def _structs(kind: Any) -> Iterator[Struct]:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield kind
    for each in get_args(kind):
        yield from _structs(each)


def _rows(kind: Struct) -> Iterator[str]:
    """Of the type's own fields."""
    source = textwrap.dedent(inspect.getsource(kind))
    [tree] = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    lines = source.splitlines()
    types = {field.name: field for field in msgspec.structs.fields(kind)}
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        field = types.get(node.target.id)
        if field is None:
            continue  # a class's own constant
        above = lines[node.lineno - 2].strip()
        if above.startswith("#"):
            yield f"| *{_cell(above.lstrip('# '))}* | | |\n"
        said = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            said = str(after.value.value)
        name = f"`{field.encode_name}`" + (", needed" if field.required else "")
        is_, becomes = _words(field.type)
        yield f"| {name} | {is_} | {_cell(' '.join(filter(None, [becomes, said])))} |\n"


def _words(kind: Any) -> tuple[str, str]:
    """What a field may be, and what becomes of it where that is not what it asks for."""
    [schema], _ = msgspec.json.schema_components([kind], ref_template=REF)
    allowed = schema.get("enum")
    if allowed is not None and allowed[:1] == [None]:
        values = ", ".join(_value(each) for each in allowed[1:])
        return (f"only {values}", "Anything else is refused.") if values else ("", "Refused.")
    return _type_words(schema), schema.get("description", "") if "type" not in schema else ""


def _type_words(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return f"`{schema['$ref'].rpartition('/')[2]}`"
    if "anyOf" in schema and schema.get("type") != "array":
        words = [_type_words(each) for each in schema["anyOf"] if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(words)) or "null"
    if "enum" in schema:
        return ", ".join(_value(each) for each in schema["enum"] if each is not None)
    match schema.get("type"):
        case "integer" | "number" as kind:
            low = schema.get("minimum", schema.get("exclusiveMinimum"))
            high = schema.get("maximum", schema.get("exclusiveMaximum"))
            name = "whole number" if kind == "integer" else "number"
            if low is None:
                return name
            over = "above " if "exclusiveMinimum" in schema else ""
            if high is None:
                return f"{name}, {over}{low:,} or more"
            return f"{name} of 64 bits" if low == -(1 << 63) else f"{name}, {over}{low:,} to {high:,}"
        case "string":
            return _with_most("text", schema.get("maxLength"), "characters")
        case "array":
            items = _type_words(schema.get("items", {}))
            return _with_most(f"list of {items}" if items else "list", schema.get("maxItems"), "")
        case "object":
            return _with_most("map", schema.get("maxProperties"), "members")
        case "boolean":
            return "true or false"
        case "null":
            return "null"
    return ""


def _with_most(what: str, most: int | None, of: str) -> str:
    return what if most is None else f"{what}, at most {most:,} {of}".rstrip()


def _value(value: Any) -> str:
    return f"`{msgspec.json.encode(value).decode()}`"


def _cell(text: str) -> str:
    """In one line of a table."""
    plain = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(text.split()))
    return re.sub(r"``([^`]+)``", r"`\1`", plain).replace("|", "\\|")


def main(arguments: list[str]) -> int:
    text = PAGE.read_text(encoding="utf-8")
    made = page(text)
    if "--write" in arguments:
        PAGE.write_text(made, encoding="utf-8")
    elif made != text:
        print("docs/api.md is not as the code says: python tooling/api.py --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
