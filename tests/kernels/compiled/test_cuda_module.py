"""Cubins: built for both architectures, once, also by two processes at once; errors are one line."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from microserve.kernels import cuda_module
from microserve.kernels.cuda_module import SOURCES, build, find_nvcc
from microserve.kernels.kernel_cache import CACHE_VARIABLE, KernelUnavailable, cache_directory
from microserve.kernels.scatter.arrival_signal import ArrivalSignal
from microserve.kernels.scatter.block_put import put_launch, put_plan
from microserve.kernels.scatter.block_scatter import scatter_launch
from tests.support.engine.device.kernel_cases import declared

MODULES = sorted(cuda_module.ENTRIES)


def nvcc() -> Path:
    try:
        return find_nvcc(os.environ)
    except KernelUnavailable as error:
        pytest.skip(f"nothing is compiled for CUDA: {error}")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, CACHE_VARIABLE: str(tmp_path / "cache")}


@pytest.fixture
def no_cupy_yet() -> Iterator[None]:
    cuda_module._cupy.cache_clear()
    yield
    cuda_module._cupy.cache_clear()


def fake_nvcc(directory: Path, script: str) -> dict[str, str]:
    """An environment whose compiler is that shell script."""
    path = directory / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return {"CUDA_HOME": str(directory), CACHE_VARIABLE: str(directory / "cache")}


COUNTING = """
if [ "$1" = --version ]; then echo fake compiler; exit; fi
echo built >> "$(dirname "$0")/../builds"
while [ "$1" != -o ]; do shift; done
echo cubin > "$2"
"""


@pytest.mark.parametrize("architecture", cuda_module.DEFAULT_ARCHITECTURES)
@pytest.mark.parametrize("name", MODULES)
def test_a_cubin_has_every_kernel(name: str, architecture: str, environment: dict[str, str]) -> None:
    nvcc()
    cubin = build(name, architecture, environment)
    content = cubin.read_bytes()
    assert content[:4] == b"\x7fELF"
    for entry in cuda_module.ENTRIES[name]:
        assert f".text.{entry}\0".encode() in content


@pytest.mark.parametrize("name", MODULES)
def test_the_signal_comes_after_fences_and_count_and_is_a_release(name: str, tmp_path: Path) -> None:
    """The order that arrival.cuh proves, in what the compiler made of it."""
    ptx = tmp_path / "kernel.ptx"
    source = SOURCES / f"{name}.cu"
    subprocess.run([nvcc(), "-arch=sm_90", "-ptx", "-std=c++17", "-o", ptx, source], check=True)
    kernels = ptx.read_text().split(".visible .entry")[1:]
    assert len(kernels) == len(cuda_module.ENTRIES[name])
    wanted = ["bar.sync", "membar.sys", "atom.global.add.u32", "membar.sys", "st.release.sys.global.u64"]
    for kernel in kernels:
        ordering = re.compile(r"bar\.sync|membar\.\w+|fence\.\S+|atom\S+|st\.release\S+")
        assert ordering.findall(kernel) == wanted
        stores = [match.start() for match in re.finditer(r"\bst\.global\.(?:v4\.)?[ub]\d+", kernel)]
        *data, reset = stores
        assert max(data) < kernel.index("bar.sync")
        assert kernel.rindex("membar.sys") < reset < kernel.index("st.release")


def test_what_is_built_stays_until_a_source_the_architecture_or_the_compiler_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "sources"
    shutil.copytree(SOURCES, sources)
    monkeypatch.setattr(cuda_module, "SOURCES", sources)
    first = fake_nvcc(tmp_path / "one", COUNTING)
    other = fake_nvcc(tmp_path / "two", COUNTING.replace("fake", "another"))
    other[CACHE_VARIABLE] = first[CACHE_VARIABLE]

    def builds() -> int:
        counts = (tmp_path / compiler / "builds" for compiler in ("one", "two"))
        return sum(len(path.read_text().splitlines()) for path in counts if path.exists())

    cubin = build("block_put", "sm_90", first)
    assert build("block_put", "sm_90", first) == cubin
    assert builds() == 1
    assert build("block_put", "sm_80", first) != cubin
    assert build("block_put", "sm_90", other) != cubin
    assert builds() == 3
    header = sources / "portable.h"
    header.write_text(header.read_text() + "\n")
    assert build("block_put", "sm_90", first) != cubin
    assert builds() == 4
    assert list(cubin.parent.glob(".*")) == []
    assert cubin.stat().st_mode & 0o777 == 0o644


def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    """Both compilers are inside before either goes on, and each renames a whole file."""
    inside = 'echo > "$(dirname "$0")/../inside"; read -r _ < "$(dirname "$0")/../go"; echo cubin'
    environment = {**os.environ, **fake_nvcc(tmp_path, COUNTING.replace("echo cubin", inside))}
    program = "from microserve.kernels.cuda_module import build; print(build('block_put', 'sm_90'))"
    command = [sys.executable, "-c", program]
    pipes = []
    for name in ("inside", "go"):
        os.mkfifo(tmp_path / name)
        pipes.append(os.open(tmp_path / name, os.O_RDWR))  # never without a reader and a writer
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for _ in running:
        assert select.select(pipes[:1], [], [], 120)[0]
        os.read(pipes[0], 1)
    os.write(pipes[1], b"1\n2\n")
    printed = [process.communicate(timeout=60)[0].strip() for process in running]
    for pipe in pipes:
        os.close(pipe)
    assert printed[0] == printed[1]
    assert Path(printed[0]).read_text() == "cubin\n"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(printed[0]).name]


def test_without_a_compiler_what_is_built_serves_and_else_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = fake_nvcc(tmp_path, COUNTING)
    cubin = build("block_put", "sm_90", environment)
    monkeypatch.setattr(cuda_module, "USUAL_NVCC", tmp_path / "nowhere")
    bare = {"PATH": str(tmp_path), CACHE_VARIABLE: environment[CACHE_VARIABLE]}
    assert build("block_put", "sm_90", bare) == cubin
    with pytest.raises(KernelUnavailable, match=r"^no nvcc: .*CUDA_HOME"):
        build("block_put", "sm_80", bare)


def test_what_the_compiler_says_is_passed_on_in_one_line(tmp_path: Path) -> None:
    script = 'if [ "$1" = --version ]; then echo 1; exit; fi; echo "no such arch" >&2; echo more >&2; exit 3'
    environment = fake_nvcc(tmp_path, script)
    with pytest.raises(KernelUnavailable, match=r"^nvcc failed for block_put for sm_90: no such arch$"):
        build("block_put", "sm_90", environment)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_compiler_that_cannot_run_and_a_cache_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    environment = fake_nvcc(tmp_path, COUNTING)
    environment[CACHE_VARIABLE] = str(tmp_path / "bin" / "nvcc" / "cache")
    with pytest.raises(KernelUnavailable, match=r"^the kernel cache .* cannot be written: Not a directory$"):
        build("block_put", "sm_90", environment)
    broken = tmp_path / "broken"
    environment = fake_nvcc(broken, "")
    (broken / "bin" / "nvcc").chmod(0o644)
    with pytest.raises(KernelUnavailable, match=r"^nvcc does not start: .*: Permission denied$"):
        build("block_put", "sm_90", environment)


def test_the_cache_is_where_the_environment_says() -> None:
    assert cache_directory({CACHE_VARIABLE: "/a/b"}) == Path("/a/b")
    assert cache_directory({"XDG_CACHE_HOME": "/c"}) == Path("/c/microserve/kernels")


WIDTHS = {"int64_t": np.int64, "uint32_t": np.uint32, "unsigned long long": np.uint64}


@pytest.mark.parametrize("name", MODULES)
def test_a_launch_passes_what_its_kernel_declares(name: str) -> None:
    """Numbers of the same width and sign, addresses as uint64, in the same order."""
    key = torch.zeros(3, 2, 8)
    slots, layer = torch.arange(3), torch.zeros(2, 2, 4, 2, 8)
    signal = ArrivalSignal(torch.zeros(1).long(), 77, torch.zeros(1).int())
    if name == "block_scatter":
        launch = scatter_launch(key, key, slots, layer, signal, 9)
        known = {"slots": slots, "layer": layer, "word": signal.words, "done": signal.counters}
    else:
        plan = put_plan([(0, 0, 16)], torch.device("cpu"))
        launch = put_launch(key.data_ptr(), layer.data_ptr(), plan, 1, (32, 64), signal, 9)
        known = {"ranges": plan.ranges, "target": layer, "words": signal.words, "done": signal.counters}
    assert launch.entry in cuda_module.ENTRIES[launch.module]
    parameters = declared(launch.module)
    types = [np.uint64 if type_.endswith("*") else WIDTHS[type_] for type_, _ in parameters]
    assert [type(argument) for argument in launch.arguments] == types
    passed = dict(zip((name for _, name in parameters), launch.arguments, strict=True))
    assert {name: passed[name] for name in known} == {name: held.data_ptr() for name, held in known.items()}
    assert passed["sequence"] == 77


def launch() -> None:
    cuda_module.Launch("block_put", "block_put", (1,), (1,), ()).enqueue(torch.device("cuda:0"))


@pytest.mark.usefixtures("no_cupy_yet")
def test_without_cupy_a_launch_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(KernelUnavailable, match=r"^no cupy \(.*\): install cupy-cuda12x or cupy-cuda13x.*$"):
        launch()


class DriverError(RuntimeError):
    """What CuPy raises."""


@pytest.mark.usefixtures("no_cupy_yet")
def test_without_a_driver_a_launch_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def count() -> Any:
        raise DriverError("cudaErrorInsufficientDriver: the driver is too old\nmore")

    runtime = SimpleNamespace(getDeviceCount=count, CUDARuntimeError=DriverError)
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(KernelUnavailable, match=r"^no CUDA device or driver: cudaErrorInsuff.* too old$"):
        launch()


@pytest.mark.usefixtures("no_cupy_yet")
def test_a_cubin_that_the_driver_does_not_take_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from an nvcc that is newer than the driver."""

    class Refused:
        def compile(self) -> None:
            raise DriverError("CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid\nand more")

    cuda = SimpleNamespace(
        runtime=SimpleNamespace(getDeviceCount=lambda: 1, CUDARuntimeError=DriverError),
        driver=SimpleNamespace(CUDADriverError=DriverError),
        Device=lambda index: nullcontext(),
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(cuda_module, "_function", lambda module, entry, index: Refused())
    with pytest.raises(KernelUnavailable, match=r"^the driver does not load .*: CUDA_ERROR_INVALID_IMAGE.*$"):
        cuda_module.load(torch.device("cuda", 0))


def test_ahead_of_time_builds_fail_with_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in fake_nvcc(tmp_path, COUNTING).items():
        monkeypatch.setenv(name, value)
    assert cuda_module.main(["sm_90"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(MODULES)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "bin" / "nvcc"))
    assert cuda_module.main([]) == 1
    said = capsys.readouterr().err
    assert said.startswith("kernels: the kernel cache")
    assert said.count("\n") == 1


def test_no_module_of_the_folder_needs_cupy_and_only_the_kernels_need_triton() -> None:
    """In a process of its own, where neither can be imported."""
    names = [path.stem for path in SOURCES.parent.glob("*.py") if not path.stem.startswith("triton_")]
    program = (
        "import sys, importlib; sys.modules.update(cupy=None, triton=None)\n"
        f"for name in {names}: importlib.import_module('microserve.kernels.' + name)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
