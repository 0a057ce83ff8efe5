"""docs/structure.md is true, and no step of its recipes is forgotten: held against the objects themselves."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from starlette.routing import Route

from microserve.gateway.app import Application
from microserve.protocol.messages import engine, index, router
from microserve.protocol.settings.settings import Settings
from microserve.services.router.strategies import BUILT_IN
from tests.support.bus import wire_samples
from tests.test_packaging import PACKAGES, ROOT, tracked

STRUCTURE = (ROOT / "docs/structure.md").read_text()
PAGES = [*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")]
NAMED = re.compile(r"`([\w./-]+\.(?:py|toml|md|cu|h|sh|conf|yaml))(?::([A-Za-z_][\w.]*))?`")


@cache
def names_in(path: Path) -> frozenset[str]:
    """Functions, classes and assignments of a file, those of a class as ``Class.name``."""
    found: set[str] = set()

    def look(body: list[ast.stmt], within: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(within + node.name)
            if isinstance(node, ast.ClassDef):
                look(node.body, f"{node.name}.")
            if isinstance(node, ast.Assign):
                found.update(within + each.id for each in node.targets if isinstance(each, ast.Name))
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(within + node.target.id)

    look(ast.parse(path.read_text()).body, "")
    return frozenset(found)


def test_every_path_and_every_name_in_structure_exists() -> None:
    named = [(path, name) for path, name in NAMED.findall(STRUCTURE) if "/" in path]
    assert len(named) > 60
    assert [path for path, _ in named if not (ROOT / path).is_file()] == []
    assert [f"{path}:{name}" for path, name in named if name and name not in names_in(ROOT / path)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_every_path_of_code_that_a_page_names_exists(page: Path) -> None:
    """With a folder: short names say their folder in the words around them."""
    if page.name == "CHANGELOG.md":
        return  # what it names was so when it was written
    found = [path for path, _ in NAMED.findall(page.read_text()) if "/" in path]
    assert [path for path in found if not (ROOT / path).is_file()] == []


def test_every_folder_has_its_sentence_and_no_other_is_named() -> None:
    folders = {path.relative_to(ROOT).parent for path in tracked()}
    folders |= {parent for folder in folders for parent in folder.parents}
    ours = {f"{folder}/" for folder in folders if not str(folder).startswith((".", "tests/"))}
    rows = re.findall(r"^\| `([\w/]+/)` \| .+ \|$", STRUCTURE, re.M)
    assert sorted(rows) == sorted(ours)


# --- a setting -------------------------------------------------------------------------------------


def settings() -> list[tuple[str, str]]:
    sections = msgspec.structs.fields(Settings)
    return [(each.name, field.name) for each in sections for field in msgspec.structs.fields(each.type)]


@cache
def code() -> str:
    """All that could read a setting: our code without the file that defines them."""
    sources = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    return "\n".join(path.read_text() for path in sources if path.name != "settings.py")


def test_every_setting_is_read_by_somebody() -> None:
    own = (ROOT / "protocol/settings/settings.py").read_text().partition("def check")[2]
    text = code() + own
    assert len(settings()) > 50
    assert [f"{section}.{name}" for section, name in settings() if not re.search(rf"\.{name}\b", text)] == []


def test_every_setting_that_a_page_names_exists() -> None:
    known = {f"{section}.{name}" for section, name in settings()}
    sections = "|".join({section for section, _ in settings()} - {"mesh"})  # mesh.pick is a strategy's
    for page in [*PAGES, ROOT / "protocol/WIRE.md"]:
        found = set(re.findall(rf"`((?:{sections})\.[a-z_]+)(?: ?=[^`]*)?`", page.read_text()))
        files = {each for each in found if each.endswith((".py", ".md", ".toml", ".yaml", ".started"))}
        events = {each for each in found if each in (ROOT / "protocol/log.py").read_text()}
        strategies = {each for each in found if each.startswith("router.strategies")}
        assert found - files - events - strategies <= known, page.name


# --- a strategy ------------------------------------------------------------------------------------


def test_every_strategy_file_is_built_in_documented_and_tested() -> None:
    files = {path.stem for path in (ROOT / "services/router/strategies").rglob("*.py")} - {"__init__"}
    assert [strategy.name for strategy in BUILT_IN] == sorted(files)
    tests = "\n".join(path.read_text() for path in (ROOT / "tests/services/router/strategies").glob("*.py"))
    readme, page = ((ROOT / name).read_text() for name in ("README.md", "docs/strategies.md"))
    for strategy in BUILT_IN:
        assert re.search(rf"^\| `{strategy.name}`", readme, re.M), f"README: {strategy.name}"
        row = re.search(
            rf"^\| `{strategy.name}` \|.*\({re.escape('../services/router/strategies/')}.*$", page, re.M
        )
        assert row, f"docs/strategies.md: {strategy.name}"
        parameters = [part.strip(" `") for part in row[0].rstrip(" |").split("|")[-1].split(",")]
        assert set(parameters) - {""} >= set(strategy.bind({}).values), strategy.name
        assert re.search(rf"\b{strategy.name}\b", tests), f"no test: {strategy.name}"


# --- a message -------------------------------------------------------------------------------------

CHANNELS: list[tuple[Any, tuple[str, ...]]] = [
    (engine.EngineRequest, ("services/engine/shell/action_server.py",)),
    (engine.EngineReply, ("services/links", "services/router/authoring", "services/command")),
    (router.RouterRequest, ("services/router/gateways.py",)),
    (router.RouterReply, ("gateway/routers/link.py",)),
    (index.IndexRequest, ("services/index/service.py", "services/index/control.py")),
    (
        index.IndexReply,
        (
            "services/engine/shell/index_client.py",
            "services/engine/rendezvous.py",
            "services/links",
            "services/command",
        ),
    ),
]
ASKED_FROM_OUTSIDE = (engine.EngineStats, index.Matches, index.IndexReport)
"""Answers that no service of ours asks for: they are there for tools that speak the wire."""
MESSAGES = [(each, receivers) for union, receivers in CHANNELS for each in get_args(union)]


@pytest.mark.parametrize(("message", "receivers"), MESSAGES, ids=lambda each: getattr(each, "__name__", ""))
def test_every_message_has_its_table_its_golden_bytes_and_a_case(
    message: Any, receivers: tuple[str, ...]
) -> None:
    assert f"#### `{message.__name__}`" in (ROOT / "protocol/WIRE.md").read_text()
    assert any(type(sample) is message for _, sample in wire_samples.MESSAGES)
    if message in ASKED_FROM_OUTSIDE:
        receivers = ("tests/services", "tests/support")
    paths = [ROOT / receiver for receiver in receivers]
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py"))]
    text = "\n".join(file.read_text() for file in files)
    without_imports = re.sub(r"^(?:from|import) .*?(?:\([^)]*\))?$", "", text, flags=re.M)
    assert re.search(rf"\b{message.__name__}\b", without_imports), f"nobody takes {message.__name__}"


# --- an endpoint -----------------------------------------------------------------------------------


def test_every_endpoint_is_in_the_table_and_asked_for_by_a_test() -> None:
    routes = [each.path for each in Application(None)._routes() if isinstance(each, Route)]  # type: ignore[arg-type]
    rows = re.findall(r"^\| `(?:GET|POST) (/[^` ]*)` \|", (ROOT / "docs/operations.md").read_text(), re.M)
    assert sorted(rows) == sorted(path.replace(":path", "") for path in routes)
    tests = "\n".join(path.read_text() for path in (ROOT / "tests/gateway").rglob("*.py"))
    for path in routes:
        named = re.escape(path.partition("{")[0])
        assert re.search(rf"{named}(?![\w/])" if "{" not in path else named, tests), path
