"""CUDA kernels of this folder as loadable functions: built by nvcc once, cached, loaded through CuPy.

Owns where cubins lie, when they are built again (never, for the same sources, architecture and compiler) and
what is said when something is missing. Must not know what a kernel does nor its arguments. Nothing here is
needed to import the modules that launch kernels: CuPy is imported at the first launch.

``python -m microserve.kernels.cuda_module [sm_90 ...]`` builds ahead of the first use, at installation say.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from microserve.kernels.kernel_cache import KernelUnavailable, cache_directory

SOURCES = Path(__file__).parent / "cuda"
ENTRIES = {
    "block_scatter": ("block_scatter_16", "block_scatter_4", "block_scatter_2"),
    "block_put": ("block_put",),
}
"""The kernels of each source."""
DEFAULT_ARCHITECTURES = ("sm_80", "sm_90")
USUAL_NVCC = Path("/usr/local/cuda/bin/nvcc")
_FLAGS = ("-cubin", "-std=c++17", "-O3")
_BUILD_LIMIT_S = 300.0


def find_nvcc(environment: Mapping[str, str]) -> Path:
    """The compiler under ``$CUDA_HOME`` or ``$CUDA_PATH``, on ``PATH``, or where CUDA installs itself.

    Raises :class:`KernelUnavailable`.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if (home := environment.get(variable)) and (nvcc := Path(home) / "bin" / "nvcc").is_file():
            return nvcc
    if found := shutil.which("nvcc", path=environment.get("PATH", os.defpath)):
        return Path(found)
    if USUAL_NVCC.is_file():
        return USUAL_NVCC
    raise KernelUnavailable("no nvcc: install the CUDA toolkit, or set CUDA_HOME to where it is")


def build(name: str, architecture: str, environment: Mapping[str, str] = os.environ) -> Path:
    """The cubin of ``cuda/<name>.cu`` for ``architecture`` (``sm_90``), from the cache or from nvcc.

    Where there is no nvcc, what any compiler has built from these sources serves. Any number of processes may
    build the same one at once: each writes a file of its own and renames it, and all of these files are
    equal. Raises :class:`KernelUnavailable`, with what the compiler said first.
    """
    directory = cache_directory(environment)
    sources = hashlib.sha256(f"{name} {architecture} {_FLAGS}\0".encode())
    for path in sorted(SOURCES.glob("*.[ch]*")):  # each header may be included by each source
        sources.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    stem = f"{name}-{architecture}-{sources.hexdigest()[:16]}"
    try:
        nvcc = find_nvcc(environment)
    except KernelUnavailable:
        for cubin in sorted(directory.glob(f"{stem}-*.cubin")):
            return cubin
        raise
    compiler = hashlib.sha256(_version(nvcc).encode()).hexdigest()[:8]
    cubin = directory / f"{stem}-{compiler}.cubin"
    if cubin.is_file():
        return cubin
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=directory, prefix=f".{cubin.name}.")
        os.close(handle)
    except OSError as error:
        raise KernelUnavailable(f"the kernel cache {directory} cannot be written: {error.strerror}") from None
    try:
        command = [str(nvcc), f"-arch={architecture}", *_FLAGS, "-o", partial, str(SOURCES / f"{name}.cu")]
        _run(command, f"{name} for {architecture}")
        os.chmod(partial, 0o644)  # one user may install what another one runs
        os.replace(partial, cubin)
    finally:
        Path(partial).unlink(missing_ok=True)
    return cubin


def load(device: torch.device) -> None:
    """Build and load every kernel on ``device``: none can be loaded while a CUDA graph is captured.

    Raises :class:`KernelUnavailable`.
    """
    index, cupy = _index(device), _cupy()
    try:
        with cupy.cuda.Device(index):
            for module, entries in ENTRIES.items():
                for entry in entries:
                    _function(module, entry, index).compile()
    except cupy.cuda.driver.CUDADriverError as error:  # an nvcc newer than the driver, say
        raise KernelUnavailable(f"the driver does not load what nvcc built: {_first_line(error)}") from None


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch in words: pure data, so that a test can hold it against the kernel's declaration."""

    module: str
    entry: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    arguments: tuple[np.generic, ...]
    """numpy scalars of exactly the widths that the kernel declares; pointers are uint64."""

    def enqueue(self, device: torch.device) -> None:
        """On torch's current stream of ``device``. Raises :class:`KernelUnavailable`."""
        cupy = _cupy()
        index = _index(device)
        stream = _Stream(torch.cuda.current_stream(device).cuda_stream)
        with cupy.cuda.Device(index), stream.in_cupy(cupy):
            _function(self.module, self.entry, index)(self.grid, self.block, self.arguments)


class _Stream:
    """torch's stream, for libraries that ask by the CUDA stream protocol: torch has it from 2.13 on."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address

    def in_cupy(self, cupy: Any) -> Any:
        """CuPy 14 deprecates the only way that CuPy 13 has."""
        if hasattr(cupy.cuda.Stream, "from_external"):
            return cupy.cuda.Stream.from_external(self)
        return cupy.cuda.ExternalStream(self._address)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _function(module: str, entry: str, index: int) -> Any:
    return _module(module, index).get_function(entry)


@functools.cache
def _module(name: str, index: int) -> Any:
    major, minor = torch.cuda.get_device_capability(index)
    return _cupy().RawModule(path=str(build(name, f"sm_{major}{minor}")))


@functools.cache
def _cupy() -> Any:
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise KernelUnavailable(
            f"no cupy ({_first_line(error)}): install cupy-cuda12x or cupy-cuda13x, as the driver is"
        ) from None
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise KernelUnavailable(f"no CUDA device or driver: {_first_line(error)}") from None
    return cupy


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _version(nvcc: Path) -> str:
    return _run([str(nvcc), "--version"], "--version")


def _run(command: list[str], what: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_LIMIT_S, check=False)
    except OSError as error:
        raise KernelUnavailable(f"nvcc does not start: {command[0]}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise KernelUnavailable(f"nvcc took more than {_BUILD_LIMIT_S:.0f} s for {what}") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
        raise KernelUnavailable(f"nvcc failed for {what}: {_first_line(said)}")
    return done.stdout


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0]


def main(architectures: list[str]) -> int:
    try:
        for architecture in architectures or DEFAULT_ARCHITECTURES:
            for name in ENTRIES:
                print(build(name, architecture))
    except KernelUnavailable as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
