"""Models that several test folders share, made or fetched once a session."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers with a byte-level tokenizer."""
    from tests.support.engine.tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct, converted on first use."""
    from microserve.services.local.demo_model import default_cache, fetch

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


@pytest.fixture(autouse=True)
def nothing_left_in_shared_memory() -> object:
    """No test may leave a segment behind."""
    before = set(os.listdir("/dev/shm"))
    yield
    left = set(os.listdir("/dev/shm")) - before
    assert not {name for name in left if "microserve" in name}
