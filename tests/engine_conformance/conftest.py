"""What any engine must do on the wire: two of them as processes, asked over their sockets (docs/engines.md).

    pytest tests/engine_conformance                                  our native engine
    pytest tests/engine_conformance --engine-settings FILE           an engine that FILE describes
    MICROSERVE_ENGINE_SETTINGS=FILE MICROSERVE_ENGINE_COMMAND=...    the same, started by another command

Tests are coroutines and see a pair of engines; each leaves both as it found them. What an engine may do
differently it says in its hello, and nothing here asks for its backend.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from microserve.protocol.bus.curve import create_mesh_keys
from tests.support.engine_conformance.engine_process import Launch
from tests.support.engine_conformance.pair import Pair

SETTINGS_VARIABLE, COMMAND_VARIABLE = "MICROSERVE_ENGINE_SETTINGS", "MICROSERVE_ENGINE_COMMAND"
PATIENCE = {"bus.liveness": "20"}
"""A router is lost after five seconds, not after one and a half: the machine that tests may be busy."""
SMALL = {
    "kvcache.num_blocks": "128",
    "kvcache.checksums": "true",
    "model.dtype": "float32",
    "engine.max_num_batched_tokens": "64",
    "engine.max_num_seqs": "8",
}
"""Of engines that no file describes: a pool that tests can fill, short steps, the numbers of transformers."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine-settings", default="", help="settings of the engines to be tested (TOML)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(600))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test that is a coroutine has a loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


@pytest.fixture(scope="session")
def settings_file(request: pytest.FixtureRequest) -> str:
    """Of the engines; empty: ours, as they come."""
    named = request.config.getoption("--engine-settings", default="") or os.environ.get(SETTINGS_VARIABLE, "")
    return str(Path(named).resolve()) if named else ""


@pytest.fixture(scope="session")
def launch(settings_file: str, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """How the engines of this run are started."""
    said = tomllib.loads(Path(settings_file).read_text()) if settings_file else {}
    model = Path(said.get("model", {}).get("path") or _random_model(tmp_path_factory))
    keys = create_mesh_keys(tmp_path_factory.mktemp("keys"))
    settings = {**PATIENCE, **({} if settings_file else SMALL)}
    return Launch(model, keys, os.environ.get(COMMAND_VARIABLE, ""), settings_file, settings)


@pytest.fixture(scope="session")
def pair(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """For tests that end no engine."""
    yield from _running(launch, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def mortal_pair(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """For tests that end engines; each starts anew what it has ended."""
    yield from _running(launch, tmp_path_factory.mktemp("mortal"))


def _running(launch: Launch, directory: Path) -> Iterator[Pair]:
    pair = Pair(launch, directory)
    pair.start()
    yield pair
    pair.stop()


def _random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small, and of sizes that any engine has kernels for."""
    from tests.support.engine.tiny_model import make_tiny_model

    return make_tiny_model(
        tmp_path_factory.mktemp("model") / "tiny",
        num_hidden_layers=4,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
