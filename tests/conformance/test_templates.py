"""A template that transformers and we render in one way is equal; one that would differ is told."""

from __future__ import annotations

import pytest

from tests.conformance import templates

PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ tools | tojson }}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
REFUSES = "{% if tools %}{{ raise_exception('no tools') }}{% endif %}{{ messages[0].content }}"


def test_equal_and_refused_by_both() -> None:
    assert set(templates.compared(PLAIN).values()) == {"equal"}
    found = templates.compared(REFUSES)
    assert found["tools"] == "both refuse" and found["turns"] == "equal"


def test_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "theirs", lambda *_: "other")
    assert set(templates.compared(PLAIN).values()) == {"differ"}
