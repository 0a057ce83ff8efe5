"""Tools and schemas as clients write them, for bodies that a generator has made: what a schema of schemas
leaves to chance is here meant."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

NAMES = st.sampled_from(["weather", "now", "a.b", "x-1", "f" * 128])
KEYS = st.sampled_from(["city", "n", "é", "$ref", "a b", ""])
_LEAVES = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {"type": st.just("string")},
        optional={
            "maxLength": st.integers(0, 20),
            "pattern": st.sampled_from(["a+", "^[a-z]{1,3}$", "(?=x)", "["]),
            "format": st.sampled_from(["date", "uuid", "email", "colour"]),
        },
    ),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["integer", "number"])},
        optional={"minimum": st.integers(-5, 5), "maximum": st.integers(-5, 5), "multipleOf": st.just(2)},
    ),
    st.sampled_from(
        [
            *({"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]}),
            *({"enum": ["a", 1, None]}, {"const": {"a": 1}}, {"$ref": "#/$defs/none"}, {"$ref": "#"}),
        ]
    ),
)


def _within(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.dictionaries(KEYS, inner, max_size=3)},
            optional={
                "required": st.lists(KEYS, max_size=2, unique=True),
                "additionalProperties": st.booleans() | inner,
            },
        ),
        st.fixed_dictionaries(
            {"type": st.just("array"), "items": inner},
            optional={"maxItems": st.integers(0, 4), "uniqueItems": st.just(True)},
        ),
        st.tuples(st.sampled_from(["anyOf", "oneOf", "allOf"]), several).map(lambda each: dict([each])),
        inner.map(lambda each: {"not": each}),
    )


SCHEMAS = st.recursive(_LEAVES, _within, max_leaves=6)
OBJECTS = st.fixed_dictionaries(
    {"type": st.just("object"), "properties": st.dictionaries(KEYS, SCHEMAS, max_size=3)}
)
_FUNCTIONS = st.lists(
    st.fixed_dictionaries(
        {"name": NAMES},
        optional={
            "description": st.text(max_size=8),
            "parameters": OBJECTS | st.just({}),
            "strict": st.booleans(),
        },
    ),
    min_size=1,
    max_size=3,
)
_CHOICES = st.sampled_from(["auto", "none", "required"])


def of_chat() -> st.SearchStrategy[dict[str, Any]]:
    """Fields that are put into a body of ``/v1/chat/completions``."""
    tools = _FUNCTIONS.map(lambda each: [{"type": "function", "function": one} for one in each])
    named = NAMES.map(lambda name: {"type": "function", "function": {"name": name}})
    return st.one_of(
        st.just({}),
        st.fixed_dictionaries(
            {"tools": tools},
            optional={"tool_choice": _CHOICES | named, "parallel_tool_calls": st.booleans()},
        ),
        of_completions(),
    )


def of_completions() -> st.SearchStrategy[dict[str, Any]]:
    """Of ``/v1/completions``, and of a conversation without tools."""
    formats = st.fixed_dictionaries({"schema": SCHEMAS}, optional={"strict": st.booleans()})
    return st.one_of(
        st.just({}),
        formats.map(lambda each: {"response_format": {"type": "json_schema", "json_schema": each}}),
        SCHEMAS.map(lambda each: {"structured_outputs": {"json": each}}),
        st.sampled_from(["a+", "(", "[a-z]{1,3}", "x" * 5000]).map(lambda each: {"guided_regex": each}),
        st.lists(st.text(max_size=4), max_size=3).map(lambda each: {"guided_choice": each}),
        st.sampled_from(['start: "a"', "root ::= [ab]+", "start: start"]).map(
            lambda each: {"structured_outputs": {"grammar": each}}
        ),
    )


def of_responses() -> st.SearchStrategy[dict[str, Any]]:
    """Of ``/v1/responses``."""
    tools = _FUNCTIONS.map(lambda each: [{"type": "function", **one} for one in each])
    named = NAMES.map(lambda name: {"type": "function", "name": name})
    formats = st.fixed_dictionaries(
        {"type": st.just("json_schema"), "name": st.just("x"), "schema": SCHEMAS},
        optional={"strict": st.booleans()},
    )
    return st.one_of(
        st.just({}),
        st.fixed_dictionaries({"tools": tools}, optional={"tool_choice": _CHOICES | named}),
        formats.map(lambda each: {"text": {"format": each}}),
    )


def of_messages() -> st.SearchStrategy[dict[str, Any]]:
    """Of ``/v1/messages``."""
    tools = _FUNCTIONS.map(
        lambda each: [
            {"name": one["name"], "input_schema": one.get("parameters") or {"type": "object"}} for one in each
        ]
    )
    named = NAMES.map(lambda name: {"type": "tool", "name": name})
    choices = st.sampled_from([{"type": "auto"}, {"type": "any"}, {"type": "none"}]) | named
    return st.one_of(
        st.just({}),
        st.fixed_dictionaries({"tools": tools}, optional={"tool_choice": choices}),
        SCHEMAS.map(lambda each: {"output_config": {"format": {"type": "json_schema", "schema": each}}}),
    )
