"""Corpora of JSON schemas with valid and invalid instances, as they are checked out: read, not kept.

MaskBench (github.com/guidance-ai/jsonschemabench) and the JSON Schema test suite
(github.com/json-schema-org/JSON-Schema-Test-Suite).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    schema: Any
    instances: list[tuple[Any, bool]]
    """And whether each is valid."""


def cases_of(directory: Path, draft: str) -> tuple[str, list[Path], Any]:
    """The corpus's name, its files, and what reads one of them. Ends the tool for another directory."""
    if (bench := directory / "maskbench" / "data").is_dir():
        return "MaskBench", sorted(bench.glob("*.json")), _maskbench
    if (suite := directory / "tests" / draft).is_dir():
        return f"JSON-Schema-Test-Suite {draft}", sorted(suite.glob("*.json")), _suite
    raise SystemExit(f"{directory} has neither maskbench/data nor tests/{draft}")


def _maskbench(path: Path) -> Iterator[Case]:
    case = json.loads(path.read_text())
    yield Case(path.stem, case["schema"], [(each["data"], each["valid"]) for each in case["tests"]])


def _suite(path: Path) -> Iterator[Case]:
    for at, group in enumerate(json.loads(path.read_text())):
        instances = [(each["data"], each["valid"]) for each in group["tests"]]
        yield Case(f"{path.stem}[{at}] {group['description']}", group["schema"], instances)


def in_order(value: Any, schema: Any) -> Any:
    """With names in the order in which the schema's text first has them, and whole numbers as integers: a
    grammar takes one order, and one way to write a number."""
    places: dict[str, int] = {}
    waiting = [schema]
    while waiting:
        each = waiting.pop(0)
        if isinstance(each, dict):
            for keyword in ("properties", "const"):
                for name in each[keyword] if isinstance(each.get(keyword), dict) else ():
                    places.setdefault(name, len(places))
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
    return _ordered(value, places)


def _ordered(value: Any, places: dict[str, int]) -> Any:
    if isinstance(value, list):
        return [_ordered(each, places) for each in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, dict):
        return value
    names = sorted(value, key=lambda name: places.get(name, len(places)))
    return {name: _ordered(value[name], places) for name in names}
