"""Random schemas of arguments, each with values that it lets through."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Pair = tuple[dict[str, Any], st.SearchStrategy[Any]]
"""A schema, and its values."""
NAMES = ("a", "b2", "long_name", "q&a", "x.y", "key with space", "é")
SLY = (
    "",
    "null",
    "true",
    "1",
    "-2.5",
    "[1",
    '{"a',
    '"',
    " x ",
    "</arg_value>",
    "</tool_call>",
    "<",
    "\\",
    "\n",
)
"""Texts that look like something else."""
TEXTS = st.sampled_from(SLY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
DEFS: dict[str, Any] = {
    "Colour": {"enum": ["red", "green"]},
    "Point": {
        "type": "object",
        "properties": {"x": {"type": "integer"}, "label": {"type": "string"}},
        "required": ["x"],
        "additionalProperties": False,
    },
    "Tree": {
        "type": "object",
        "properties": {"of": {"anyOf": [{"$ref": "#/$defs/Tree"}, {"type": "null"}]}},
        "required": ["of"],
        "additionalProperties": False,
    },
}
TREES = st.recursive(st.just({"of": None}), lambda inner: inner.map(lambda of: {"of": of}), max_leaves=3)
POINTS = st.one_of(
    st.integers(-9, 99).map(lambda x: {"x": x}),
    st.tuples(st.integers(-9, 99), TEXTS).map(lambda pair: {"x": pair[0], "label": pair[1]}),
)
LEAVES: list[Pair] = [
    ({"type": "string"}, TEXTS),
    ({"type": "string", "minLength": 1, "maxLength": 4}, st.text("ab{<é", min_size=1, max_size=4)),
    ({"enum": ["red", "</b>", "no"]}, st.sampled_from(["red", "</b>", "no"])),
    ({"const": "1"}, st.just("1")),
    ({"type": "string", "pattern": "^[a-c]{1,3}$"}, st.text("abc", min_size=1, max_size=3)),
    ({"type": "string", "pattern": "b+"}, st.text("ac", max_size=2).map(lambda text: f"{text}b")),
    ({"type": "string", "format": "date"}, st.dates().map(str)),
    ({"type": "string", "format": "uuid"}, st.uuids().map(str)),
    ({"type": "integer"}, st.integers(-(10**6), 10**6)),
    ({"type": "integer", "minimum": 2, "maximum": 7}, st.integers(2, 7)),
    ({"type": "number"}, st.sampled_from([0, 1.5, -2.25, 1e20, 3])),
    ({"type": "boolean"}, st.booleans()),
    ({"type": "null"}, st.none()),
    ({"type": ["string", "null"]}, TEXTS | st.none()),
    ({"type": ["integer", "string"]}, st.integers(-9, 9) | TEXTS),
    (
        {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "integer", "minimum": 5}]},
        st.integers(5, 9) | st.text("xyz", min_size=1, max_size=3),
    ),
    ({"enum": ["x", 1, None, True]}, st.sampled_from(["x", 1, None, True])),
    ({"$ref": "#/$defs/Colour"}, st.sampled_from(["red", "green"])),
    ({"allOf": [{"$ref": "#/$defs/Colour"}]}, st.sampled_from(["red", "green"])),
    ({"$ref": "#/$defs/Point"}, POINTS),
    ({"anyOf": [{"$ref": "#/$defs/Point"}, {"type": "null"}]}, POINTS | st.none()),
    ({"$ref": "#/$defs/Tree"}, TREES),
    ({}, TEXTS | st.integers(-9, 9) | st.booleans() | st.none() | st.lists(st.integers(0, 9), max_size=2)),
    ({"type": "object"}, st.dictionaries(st.sampled_from(["k", "l"]), TEXTS | st.integers(0, 9), max_size=2)),
]  # fmt: skip


@st.composite
def schemas(draw: st.DrawFn, depth: int = 2) -> Pair:
    kind = draw(st.sampled_from(["leaf", "leaf", "leaf", "list", "map", "either"])) if depth else "leaf"
    if kind == "leaf":
        return draw(st.sampled_from(LEAVES))
    if kind == "map":
        return draw(maps(depth - 1))
    schema, values = draw(schemas(depth - 1))
    if kind == "list":
        least = draw(st.integers(0, 1))
        rule = {"type": "array", "items": schema, "minItems": least, "maxItems": 2}
        return rule, st.lists(values, min_size=least, max_size=2)
    other, others = draw(schemas(depth - 1))
    return {"anyOf": [schema, other]}, values | others


@st.composite
def maps(draw: st.DrawFn, depth: int = 2) -> Pair:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=3))
    members = {name: draw(schemas(depth)) for name in names}
    required = draw(st.sets(st.sampled_from(names))) if names else set[str]()
    schema = {
        "type": "object",
        "properties": {name: schema for name, (schema, _) in members.items()},
        "required": [name for name in names if name in required],
        "additionalProperties": False,
    }
    whole = st.fixed_dictionaries({name: values for name, (_, values) in members.items()})
    left_out = st.sets(st.sampled_from([name for name in names if name not in required] or [""]))

    def some(pair: tuple[dict[str, Any], set[str]]) -> dict[str, Any]:
        return {name: pair[0][name] for name in names if name not in pair[1]}  # in the order of the schema

    return schema, st.tuples(whole, left_out).map(some)


@st.composite
def arguments(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """A schema of a tool's arguments, and some that fit."""
    schema, values = draw(maps())
    return {**schema, "$defs": DEFS}, draw(values)
