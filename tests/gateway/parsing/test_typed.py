"""A value that is written without its type is read once, however much its tool's schema says of it."""

from __future__ import annotations

import pytest

from microserve.gateway.parsing import calls


def test_a_schema_of_many_kinds_reads_a_value_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    literal = calls._literal

    def counted(text: str) -> object:
        read.append(text)
        return literal(text)

    monkeypatch.setattr(calls, "_literal", counted)
    text = "[1, 2"
    assert calls.typed(text, {"anyOf": [{"type": "integer"}] * 3000}) == text
    assert len(read) == 1


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("2.0", "integer", 2),
        ("2.5", "integer", "2.5"),
        ("[1, 'a']", "array", [1, "a"]),
        ("True", "number", "True"),
    ],
)
def test_it_is_read_as_its_kind(text: str, kind: str, value: object) -> None:
    found = calls.typed(text, {"type": kind})
    assert (found, type(found)) == (value, type(value))
