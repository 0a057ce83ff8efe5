"""What the kernels' tests share: their address arithmetic as a CPU library, and one thread for torch."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from microserve.kernels.cuda_module import SOURCES


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """``host_kernels.cpp`` with undefined behaviour and misaligned access made fatal."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++: the address arithmetic of the CUDA kernels is not checked")
    library = tmp_path_factory.mktemp("host-kernels") / "host_kernels.so"
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fno-strict-aliasing", "-fPIC"]
    command += ["-shared", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", f"-I{SOURCES}"]
    source = Path(__file__).with_name("host_kernels.cpp")
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    for name in ("emulate_key_row", "piece_nbytes"):
        getattr(loaded, name).restype = ctypes.c_int64
    return loaded
