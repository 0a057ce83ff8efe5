"""A document that is named exists: in code, comments, other documents and tooling."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.test_packaging import PACKAGES, ROOT, tracked

NAMED = re.compile(r"(?<![\w:/])(?:\.{0,2}/)*[\w.-]+(?:/[\w.-]+)*\.md\b(?!\.)")
MODULE = re.compile(r"(?<![\w.<])([a-z_0-9]+\.py)\b")
LINKED = re.compile(r"\]\(([^)#:\s]+\.md)(?:#[^)]*)?\)")
WITHOUT_ENDING = re.compile(r"\b(?:ARCHITECTURE|DESIGN|WIRE),? \d")
"""A page and a number, as the text once referred to a design that was nowhere."""
TEXT = {".py", ".md", ".toml", ".yml", ".yaml", ".sh", ".conf", ".service", ".cfg", ".cu", ""}
SELF = Path(__file__).resolve()

FILES = [path for path in tracked() if path.suffix in TEXT and path.resolve() != SELF]


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def names_in(text: str) -> list[str]:
    """Of documents. The pattern is slow: it looks at lines only that could have one."""
    return [name for line in text.splitlines() if ".md" in line for name in NAMED.findall(line)]


def missing(name: str, file: Path, documents: set[Path]) -> bool:
    """A name is a path from the root or from the file that names it, or the name of one document."""
    if "/" not in name:
        return name not in {document.name for document in documents}
    return not {(base / name).resolve() for base in (ROOT, file.parent)} & documents


def test_every_document_that_is_named_exists() -> None:
    documents = {path for path in tracked() if path.suffix == ".md"}
    assert {ROOT / "README.md", ROOT / "protocol/WIRE.md"} <= documents
    named = [(file, name) for file in FILES for name in names_in(text_of(file))]
    assert len(named) > 50, "the pattern finds names"

    dangling = [f"{file.relative_to(ROOT)}: {name}" for file, name in named if missing(name, file, documents)]

    assert dangling == []


def test_every_module_that_a_docstring_names_exists() -> None:
    """Moved files leave names behind in prose; a reader would look for them in vain."""
    modules = {path.name for path in tracked() if path.suffix == ".py"}
    rooms = {*PACKAGES, "benchmarks", "examples"}
    texts = {
        file: text_of(file)
        for file in FILES
        if file.suffix == ".py" and file.relative_to(ROOT).parts[0] in rooms
    }
    assert sum(len(MODULE.findall(text)) for text in texts.values()) > 100, "the pattern finds names"

    dangling = [
        f"{file.relative_to(ROOT)}: {name}"
        for file, text in texts.items()
        if set(MODULE.findall(text)) - modules  # is it in prose? Few files have to be read as code for that
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for name in MODULE.findall(str(node.value.value))
        if name not in modules
    ]

    assert dangling == []


def test_every_link_between_documents_leads_to_one() -> None:
    for file in FILES:
        if file.suffix == ".md":
            for target in LINKED.findall(text_of(file)):
                assert (file.parent / target).is_file(), f"{file.relative_to(ROOT)} links to {target}"


def test_no_page_is_cited_by_number_without_its_name() -> None:
    cited = [
        f"{file.relative_to(ROOT)}: {found}"
        for file in FILES
        for found in WITHOUT_ENDING.findall(text_of(file))
    ]

    assert cited == []


@pytest.mark.parametrize(
    ("name", "is_missing"),
    [("WIRE.md", False), ("protocol/WIRE.md", False), ("WIRES.md", True), ("kvcache/WIRE.md", True)],
)
def test_a_name_is_looked_for_where_it_is_written(name: str, is_missing: bool) -> None:
    assert missing(name, ROOT / "README.md", {ROOT / "README.md", ROOT / "protocol/WIRE.md"}) is is_missing
