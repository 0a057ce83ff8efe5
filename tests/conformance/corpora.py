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
    """With names in the order of the schema: a grammar takes one order. What it does not name comes last,
    and what it says by reference keeps its own order."""
    known = schema if isinstance(schema, dict) else {}
    if isinstance(value, list):
        return [in_order(each, known.get("items")) for each in value]
    if not isinstance(value, dict):
        return value
    named = known.get("properties")
    named = named if isinstance(named, dict) else known.get("const")
    named = named if isinstance(named, dict) else {}
    names = [*(name for name in named if name in value), *(name for name in value if name not in named)]
    return {name: in_order(value[name], named.get(name)) for name in names}


def in_integers(value: Any) -> Any:
    """With whole numbers as integers: a grammar has one way to write an integer."""
    if isinstance(value, list):
        return list(map(in_integers, value))
    if isinstance(value, dict):
        return {name: in_integers(each) for name, each in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value
