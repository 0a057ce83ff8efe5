"""A value that is written without its type is read once, however much its tool's schema says of it."""

from __future__ import annotations

import pytest

from microserve.gateway.parsing import typed


def test_a_schema_of_many_kinds_reads_a_value_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    literal = typed._literal

    def counted(text: str) -> object:
        read.append(text)
        return literal(text)

    monkeypatch.setattr(typed, "_literal", counted)
    text = "[1, 2"
    assert typed.typed(text, {"anyOf": [{"type": "integer"}] * 3000}) == text
    assert len(read) == 1


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("2.0", "integer", 2),
        ("2.5", "integer", "2.5"),
        ("[1, 'a']", "array", [1, "a"]),
        ("True", "number", "True"),
        ("-1e999", "number", -1.7976931348623157e308),
    ],
)
def test_it_is_read_as_its_kind(text: str, kind: str, value: object) -> None:
    found = typed.typed(text, {"type": kind})
    assert (found, type(found)) == (value, type(value))


DEFS = {"Shape": {"type": "object"}, "Colour": {"enum": ["red"]}, "Me": {"$ref": "#/$defs/Me"}}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"anyOf": [{"$ref": "#/$defs/Shape"}, {"type": "null"}]}, '{"a": 1}', {"a": 1}),
        ({"anyOf": [{"$ref": "#/$defs/Shape"}, {"type": "null"}]}, "null", None),
        ({"allOf": [{"$ref": "#/$defs/Colour"}]}, "red", "red"),
        ({"$ref": "#/$defs/Colour"}, "1", "1"),
        ({"$ref": "#/$defs/Me"}, "1", 1),
        ({"$ref": "#/$defs/None"}, "x", "x"),
    ],
)
def test_a_reference_is_what_it_refers_to(schema: object, text: str, value: object) -> None:
    types = typed.schemas_of({"properties": {"p": schema}, "$defs": DEFS})
    assert typed.typed(text, types["p"]) == value
