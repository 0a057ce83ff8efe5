"""Which room is in which lane, and what all rooms share: models, made or fetched once a session."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import hypothesis
import pytest

from tests.support.examples import QUICK_PROFILE, examples_in_quick

# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("mesh", deadline=None)
hypothesis.settings.register_profile(QUICK_PROFILE, deadline=None, max_examples=examples_in_quick(100))
hypothesis.settings.load_profile("mesh")

# Tests hold what engines count against what their clients saw; those of the self-check turn it on.
os.environ.setdefault("MICROSERVE_ROUTER__CHECK_INTERVAL_S", "0")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background jobs ignore it, and so would every process that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).parent
QUICK = (
    *("protocol", "kvcache/prefix", "kvcache/grant", "kvcache/test_block_pool.py", "kvcache/test_layout.py"),
    *("gateway", "services/router", "services/links", "services/index"),
    *("test_recipes.py", "test_documents.py", "test_clients_page.py"),
    *("kernels/cpu/test_build.py", "kernels/cpu/test_objects.py"),
    *(f"services/engine/core/test_{name}.py" for name in ("core", "batch", "scheduler", "leaving")),
    "services/engine/core/measure/test_rates.py",
    *(f"services/command/top/test_{name}.py" for name in ("picture", "column", "story")),
)
"""What guards state and wire: rooms and files of ``-m quick``, the floor of every change. Files there about
crowds, endurance or processes are marked ``slow``."""
ROOMS = ("system", "gpu", "simulation", "clients", "hosts", "peers", "page", "boards")
"""All that lies in such a room is marked with its name."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """``-m quick`` does not even import the others: torch alone takes seconds."""
    if config.option.markexpr != "quick" or not collection_path.is_relative_to(TESTS):
        return None
    path = collection_path.relative_to(TESTS)
    quick = [Path(each) for each in QUICK]
    return not any(path.is_relative_to(each) or each.is_relative_to(path) for each in quick) or None


@cache
def _lane_of(path: Path) -> tuple[str, bool]:
    """Of a file: its outermost room, and whether what is in it is quick where it does not say otherwise."""
    path = path.relative_to(TESTS)
    return path.parts[0], any(path.is_relative_to(each) for each in QUICK)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What stays for good is no garbage: ten thousand tests and all modules are looked at no more."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Meshes come first: one worker has them one by one, the other takes what is small from the end."""
    for item in items:
        room, is_quick = _lane_of(item.path)
        if room in ROOMS:
            item.add_marker(room)
        if is_quick and not any(item.get_closest_marker(each) for each in ("slow", "heavy", "vllm")):
            item.add_marker("quick")
    items.sort(key=lambda item: item.get_closest_marker("system") is None)


def pytest_configure(config: pytest.Config) -> None:
    """Before a test is imported, which is when hypothesis reads its profile."""
    if config.option.markexpr == "quick":
        hypothesis.settings.load_profile(QUICK_PROFILE)
    # Two pools of threads that spin for the same cores cost ten times as much: a worker has one thread.
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers with a byte-level tokenizer."""
    from tests.support.engine.model.tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """Of vLLM's environment, in which this checkout's ``microserve`` is found."""
    named = os.environ.get("MICROSERVE_TEST_VLLM_PYTHON")
    if not named:
        pytest.skip("needs vLLM's environment: make test-vllm")
    return Path(named)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct, converted on first use."""
    from microserve.services.local.demo.model import default_cache, fetch

    return fetch(default_cache(os.environ))


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The address arithmetic of the CUDA kernels as a CPU library (``kernels/host_kernels.cpp``), with
    undefined behaviour and misaligned access made fatal."""
    from microserve.kernels.cuda_module import SOURCES

    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++: the address arithmetic of the CUDA kernels is not checked")
    library = tmp_path_factory.mktemp("host-kernels") / "host_kernels.so"
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fno-strict-aliasing", "-fPIC"]
    command += ["-shared", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", f"-I{SOURCES}"]
    source = Path(__file__).with_name("kernels") / "host_kernels.cpp"
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    for name in ("emulate_key_row", "piece_nbytes"):
        getattr(loaded, name).restype = ctypes.c_int64
    return loaded


@pytest.fixture(scope="session", autouse=True)
def packed_weights_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Engines that tests start keep their packed weights here, and not in the user's cache."""
    os.environ["MICROSERVE_PACKED_CACHE"] = str(tmp_path_factory.mktemp("packed"))


@pytest.fixture(autouse=True)
def nothing_left_in_shared_memory() -> Iterator[None]:
    """No test may leave a segment that has a name: nothing of ours makes one, on any worker."""
    before = set(os.listdir("/dev/shm"))
    yield
    left = set(os.listdir("/dev/shm")) - before
    assert not {name for name in left if "microserve" in name}
