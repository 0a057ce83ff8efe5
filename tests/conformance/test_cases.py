"""The table of cases in docs/reliability.md names tests that there are; a corpus is counted right."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from tests.conformance.conformance import Judge, Tally, report
from tests.conformance.corpora import Case, in_integers, in_order

ROOT = Path(__file__).parents[2]


@cache
def known_tests() -> frozenset[str]:
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for each in ast.walk(ast.parse(path.read_text())):
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(each.name)
    return frozenset(found)


def test_each_case_has_its_tests() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    text = text.partition("case by case")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in text.splitlines() if re.match(r"\| \d", line)]
    numbers = [int(each) for row in rows for each in row[0].split(",")]
    assert numbers == list(range(1, 26))
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row[-1])
        assert named and set(named) <= known_tests(), row


POINT = {
    "type": "object",
    "properties": {"b": {"type": "integer"}, "a": {"type": "string"}},
    "required": ["a"],
    "additionalProperties": False,
}


def test_a_corpus_is_counted() -> None:
    tally = Tally()
    judge = Judge(None, is_strict=False)
    instances = [
        ({"b": 1, "a": "x"}, True),
        ({"a": "x", "b": 2.0}, True),
        ({"a": 1}, False),
        ({"b": 2}, False),
        ({"a": "x", "b": 2.5}, False),
        ({"a": "y"}, False),  # which is wrong of the corpus
    ]
    judge.judge(Case("point", POINT, instances), tally)
    judge.judge(Case("colour", {"type": "string", "format": "colour"}, [("x", False)]), tally)
    judge.judge(Case("unique", {"type": "array", "uniqueItems": True}, [([1, 1], False)]), tally)
    assert tally.counts == {
        **{"schemas": 3, "compiled": 1, "compiled with a warning": 1, "valid": 2, "valid, accepted": 1},
        **{"valid, accepted in order": 1, "invalid": 5, "invalid, rejected": 3},
        "invalid, accepted with a warning": 1,
    }
    assert tally.refused == {"uniqueItems": 1} and not tally.rejected
    assert tally.silent == ['point: {"a": "y"}']
    assert "silent 1" in report("two", tally, 1.0, is_strict=False)


def test_an_instance_is_put_in_the_schemas_order() -> None:
    value = in_order({"z": 1, "a": "x", "b": 2.0}, POINT)
    assert list(value) == ["b", "a", "z"]
    [two] = in_integers([2.0])
    assert (two, type(two)) == (2, int)
