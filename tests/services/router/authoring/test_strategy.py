from __future__ import annotations

import os
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Annotated, Any

import pytest
from msgspec import Meta

from microserve.protocol.errors import ConfigError, StrategyError, StrategyNotFound
from microserve.protocol.settings.settings import RouterSettings
from microserve.services.links.stream import Tokens
from microserve.services.router.authoring.definition import load_file, strategy
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.request.request import Request
from microserve.services.router.rollout.book import StrategyBook
from microserve.services.router.service import load_strategies
from microserve.services.router.strategies import BUILT_IN

SOURCE = """
from __future__ import annotations
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.request.request import Request
from microserve.services.router.authoring.definition import strategy
from microserve.services.router.strategies.splitting.balanced import balanced

@strategy
async def mine(mesh: Mesh, request: Request, *, label: str = "decode", tries: int = 2):
    "My own."
    async for tokens in mesh.pick(label, request).start_generate(request):
        yield tokens
"""


@strategy
async def tuned(
    mesh: Mesh,
    request: Request,
    *,
    ratio: Annotated[float, Meta(ge=0, le=1)] = 0.5,
    labels: list[str] = ["a"],  # noqa: B006  (parameters are plain data)
    verbose: bool = False,
) -> AsyncGenerator[Tokens, None]:
    """For these tests."""
    raise NotImplementedError
    yield


def test_the_decorator_keeps_name_types_defaults_and_text() -> None:
    assert tuned.name == "tuned"
    assert dict(tuned.values) == {"ratio": 0.5, "labels": ["a"], "verbose": False}
    assert tuned.description == "For these tests."


def test_binding_converts_and_leaves_the_original() -> None:
    bound = tuned.bind({"ratio": 1, "labels": ["x", "y"]})
    assert dict(bound.values) == {"ratio": 1.0, "labels": ["x", "y"], "verbose": False}
    assert tuned.values["ratio"] == 0.5


@pytest.mark.parametrize(
    ("values", "path", "text"),
    [
        ({"rato": 0.1}, "router.strategies.tuned.rato", "(has: ratio, labels, verbose), did you mean ratio?"),
        ({"ratio": "high"}, "router.strategies.tuned.ratio", "must be a number from 0 to 1, is 'high'"),
        ({"ratio": 1.5}, "router.strategies.tuned.ratio", "must be a number from 0 to 1, is 1.5"),
        ({"labels": [1]}, "router.strategies.tuned.labels", 'must be a list ["...", ...] of texts, is [1]'),
        ({"verbose": 1}, "router.strategies.tuned.verbose", "must be true or false, is 1"),
    ],
)
def test_a_wrong_parameter_names_its_path(values: dict[str, Any], path: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        StrategyBook([tuned]).configure({"tuned": values})
    assert caught.value.field == path
    assert text in caught.value.detail


def test_parameters_of_an_unknown_strategy() -> None:
    with pytest.raises(ConfigError) as caught:
        StrategyBook([tuned]).configure({"tunde": {}})
    assert caught.value.field == "router.strategies.tunde"


async def no_generator(mesh: Mesh, request: Request) -> None: ...


async def no_default(mesh: Mesh, request: Request, *, ratio: float) -> AsyncGenerator[Tokens, None]:
    yield Tokens(0, [])


async def no_type(mesh: Mesh, request: Request, *, ratio=0.1) -> AsyncGenerator[Tokens, None]:  # type: ignore[no-untyped-def]
    yield Tokens(0, [])


async def bad_default(
    mesh: Mesh,
    request: Request,
    *,
    ratio: float = "x",  # type: ignore[assignment]
) -> AsyncGenerator[Tokens, None]:
    yield Tokens(0, [])


async def positional(mesh: Mesh, request: Request, ratio: float = 0.1) -> AsyncGenerator[Tokens, None]:
    yield Tokens(0, [])


async def catch_all(mesh: Mesh, request: Request, **anything: Any) -> AsyncGenerator[Tokens, None]:
    yield Tokens(0, [])


async def unreadable(mesh: Mesh, request: Request, *, x: Nowhere = 1) -> AsyncGenerator[Tokens, None]:  # type: ignore[name-defined]  # noqa: F821
    yield Tokens(0, [])


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (no_generator, "must be an 'async def' with 'yield'"),
        (no_default, "ratio needs a type and a default"),
        (no_type, "ratio needs a type and a default"),
        (bad_default, "default of ratio"),
        (positional, "must take (mesh, request, *, named parameters)"),
        (catch_all, "must take (mesh, request, *, named parameters)"),
        (unreadable, "annotations cannot be read"),
    ],
)
def test_a_function_of_the_wrong_shape(function: Any, text: str) -> None:
    with pytest.raises(StrategyError) as caught:
        strategy(function)
    assert text in caught.value.detail
    assert function.__name__ in caught.value.detail


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(StrategyNotFound, match="tuned"):
        StrategyBook([tuned]).get("other")


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ConfigError, match="two strategies are named tuned"):
        StrategyBook([tuned, tuned])


def test_an_operators_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SOURCE, encoding="utf-8")
    settings = RouterSettings(
        strategy_files=[str(file)],
        default_strategy="mine",
        strategies={"mine": {"label": "prefill"}, "balanced": {"ratio": 0.2}},
    )
    book = load_strategies(settings)
    assert book.names == sorted([*(item.name for item in BUILT_IN), "mine"])
    assert dict(book.get("mine").values) == {"label": "prefill", "tries": 2}
    assert book.get("balanced").values["ratio"] == 0.2


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("x = 1", "defines no strategy"),
        ("def (", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        (SOURCE.replace("yield tokens", "pass"), "must be an 'async def' with 'yield'"),
        (None, "FileNotFoundError"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, source: str | None, text: str) -> None:
    file = tmp_path / "mine.py"
    if source is not None:
        file.write_text(source, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_file(str(file))
    assert caught.value.field == "router.strategy_files"
    assert text in caught.value.detail


def test_a_file_may_not_take_a_built_in_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SOURCE.replace("def mine", "def auto"), encoding="utf-8")
    with pytest.raises(ConfigError, match="two strategies are named auto"):
        load_strategies(RouterSettings(strategy_files=[str(file)]))


def test_a_file_runs_as_it_stands_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed twice within a second and of the same size: all that Python's own cache looks at."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "mine.py"
    for label in ("decode", "either"):
        file.write_text(SOURCE.replace("decode", label), encoding="utf-8")
        os.utime(file, (1, 1))
        assert load_file(str(file))[0].values == {"label": label, "tries": 2}


def test_a_file_that_is_no_python() -> None:
    with pytest.raises(ConfigError, match="not a Python file"):
        load_file("strategies.toml")


def test_an_unknown_default() -> None:
    with pytest.raises(ConfigError) as caught:
        load_strategies(RouterSettings(default_strategy="fastest"))
    assert caught.value.field == "router.default_strategy"
