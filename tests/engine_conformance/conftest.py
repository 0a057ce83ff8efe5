"""What any engine must do on the wire: two of them as processes, asked over their sockets (docs/engines.md).

    pytest tests/engine_conformance                                  our native engine
    pytest -m vllm tests/engine_conformance                          vLLM behind our shell (make test-vllm)
    pytest -m hosts tests/engine_conformance                         native engines, by each kind of door, on
                                                                     one host and between two (make hosts);
                                                                     -m "hosts and not slow": what is marked
                                                                     ``sample``, by nixl between two
    pytest tests/engine_conformance --engine-settings FILE           an engine that FILE describes
    MICROSERVE_TEST_ENGINE_SETTINGS=FILE pytest ...                  the same
    MICROSERVE_TEST_ENGINE_COMMAND=...                               by another command than our microserve

Tests are coroutines and see a pair of engines; each leaves both as it found them. What an engine may do
differently it says in its hello, and nothing here asks for its backend; this file alone knows how
one is started.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import tomllib
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from microserve.protocol.bus.curve import create_mesh_keys
from tests.support.engine_conformance.engine_process import EngineProcess, Launch
from tests.support.engine_conformance.pair import Pair
from tests.support.hosts.namespaces import why_not
from tests.support.hosts.world import World

SETTINGS_VARIABLE, COMMAND_VARIABLE = "MICROSERVE_TEST_ENGINE_SETTINGS", "MICROSERVE_TEST_ENGINE_COMMAND"
PATIENCE = {"bus.liveness": "20", "kvcache.lease_s": "300"}
"""A router is lost after five seconds, not after one and a half, and a grant waits for minutes: the machine
that tests may be busy. What is about leases has an engine with short ones (``Pair.a``)."""
SMALL = {
    "model.dtype": "float32",
    "engine.max_num_seqs": "8",
    "kvcache.checksums": "true",
}
"""Of engines that no file describes: pools that tests can fill, short steps, the numbers of transformers."""
NATIVE = {"kvcache.num_blocks": "128", "engine.max_num_batched_tokens": "64"}
VLLM = {
    "engine.backend": "vllm",
    "engine.max_model_len": "1024",
    "engine.max_num_batched_tokens": "128",
    "kvcache.block_size": "32",
    "vllm.kv_cache_mb": "16",
    "vllm.enforce_eager": "true",
}
"""A block of its CPU kernels is 32 tokens at least."""


DOORS = ("tcp", "nixl")
SAMPLED = "nixl between hosts"
"""The kind behind doors of which the short form of ``make hosts`` has a sample."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine-settings", default="", help="settings of the engines to be tested (TOML)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test for each kind of engine, or for those that a file describes."""
    if "launch" in metafunc.fixturenames:
        kinds: list[Any] = ["native", pytest.param("vllm", marks=pytest.mark.vllm)]
        if "hosts" in metafunc.config.option.markexpr.replace("not hosts", ""):
            # Nobody else waits for as much again four times.
            kinds += [pytest.param(each, marks=_marks_of(each)) for each in _kinds_behind_doors()]
        metafunc.parametrize(
            "launch", ["file"] if _settings_file(metafunc.config) else kinds, indirect=True, scope="session"
        )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(1_200))
            is_sample = _kind_of(item) == SAMPLED and item.get_closest_marker("sample")
            if _kind_of(item) in _kinds_behind_doors() and not is_sample:
                item.add_marker("slow")


def _kind_of(item: pytest.Item) -> str:
    return str(item.callspec.params.get("launch", "")) if isinstance(item, pytest.Function) else ""


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test that is a coroutine has a loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


def _kinds_behind_doors() -> list[str]:
    return [f"{door}{where}" for door in DOORS for where in ("", " between hosts")]


def _marks_of(kind: str) -> list[pytest.MarkDecorator]:
    door, is_between_hosts = kind.split(maxsplit=1)[0], " " in kind
    marks = [pytest.mark.hosts]
    if door == "nixl":
        marks.append(pytest.mark.skipif(find_spec("nixl") is None, reason="needs the extra nixl"))
    if is_between_hosts:
        marks.append(pytest.mark.skipif(bool(reason := why_not()), reason=reason))
    return marks


def _settings_file(config: pytest.Config) -> str:
    named = config.getoption("--engine-settings", default="") or os.environ.get(SETTINGS_VARIABLE, "")
    return str(Path(named).resolve()) if named else ""


@pytest.fixture(scope="session")
def launch(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """How the engines of this run are started."""
    keys = create_mesh_keys(tmp_path_factory.mktemp("keys"))
    command = os.environ.get(COMMAND_VARIABLE, "")
    if request.param in _kinds_behind_doors():
        model, (door, *where) = request.getfixturevalue("random_model"), request.param.split()
        settings = {
            **PATIENCE,
            **SMALL,
            **NATIVE,
            "kvcache.doors": f'["{door}"]',
            "kvcache.share_memory": "false",
        }
        with World(tmp_path_factory.mktemp("hosts")) if where else nullcontext() as world:
            yield Launch(model, keys, "", "", settings, world, oracle="float32")
        return
    if request.param == "file":
        config = _settings_file(request.config)
        path = tomllib.loads(Path(config).read_text()).get("model", {}).get("path")
        model = Path(path) if path else request.getfixturevalue("random_model")
        yield Launch(model, keys, command, config, PATIENCE)
        return
    settings = {**PATIENCE, **SMALL, **(VLLM if request.param == "vllm" else NATIVE)}
    if request.param == "vllm":
        settings["vllm.python"] = str(request.getfixturevalue("vllm_python"))
        command = command or f"{sys.executable} -m microserve.services.command.main"
    yield Launch(request.getfixturevalue("random_model"), keys, command, "", settings, oracle="float32")


@pytest.fixture(scope="session")
def pair(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """For tests that end no engine."""
    yield from _running(launch, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def mortal_pair(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """For tests that end engines; each starts anew what it has ended."""
    yield from _running(launch, tmp_path_factory.mktemp("mortal"))


@pytest.fixture(scope="module")
def third(pair: Pair) -> Iterator[EngineProcess]:
    """One more engine beside the pair."""
    engine = pair.start_another("engine-c")
    yield engine
    engine.stop()


def _running(launch: Launch, directory: Path) -> Iterator[Pair]:
    pair = Pair(launch, directory)
    pair.start()
    yield pair
    pair.stop()


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small, and of sizes that any engine has kernels for."""
    from tests.support.engine.model.tiny_model import make_tiny_model

    return make_tiny_model(
        tmp_path_factory.mktemp("model") / "tiny",
        num_hidden_layers=4,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
