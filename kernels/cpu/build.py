"""The native step as a shared object: built once by the system's C++ compiler, and cached.

Owns which compiler, which flags, where objects lie and when they are built again (never, for the same
sources, flags and compiler). Must not know what is computed. ``python -m microserve.kernels.cpu.build``
builds it ahead of the first use.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from microserve.kernels.cuda_module import KernelUnavailable, cache_directory

SOURCES = Path(__file__).parent / "native"
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    # Which FMAs there are is written in the sources, and not for the compiler to choose.
    *("-ffp-contract=off", "-fno-math-errno"),
)
VARIANT_FLAGS = {
    "variant_avx2.cc": ("-mavx2", "-mfma"),
    "variant_avx512.cc": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
}
X86 = ("x86_64", "AMD64")
BUILD_LIMIT_S = 300.0


def find_compiler(environment: Mapping[str, str]) -> list[str]:
    """``$CXX``, or the system's, or the one of the package ``ziglang``. Raises :class:`KernelUnavailable`."""
    if named := environment.get("CXX"):
        return shlex.split(named)
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name, path=environment.get("PATH", os.defpath)):
            return [found]
    if find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++"]
    raise KernelUnavailable("no C++ compiler: install g++ or clang++, or the package ziglang")


def sources(machine: str = platform.machine()) -> list[Path]:
    """What is compiled on a machine."""
    found = sorted(SOURCES.glob("*.cc"))
    return [path for path in found if machine in X86 or path.name not in VARIANT_FLAGS]


def build(environment: Mapping[str, str] = os.environ) -> Path:
    """The shared object, from the cache or from the compiler.

    Any number of processes may build it at once: each writes a file of its own and renames it. Raises
    :class:`KernelUnavailable`, with what the compiler said first.
    """
    compiler = find_compiler(environment)
    target = cache_directory(environment) / f"cpu-step-{_digest(compiler)}.so"
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
            built = _compile(compiler, Path(name))
            os.chmod(built, 0o755)
            os.replace(built, target)
    except OSError as error:
        raise KernelUnavailable(
            f"the kernel cache {target.parent} cannot be written: {error.strerror}"
        ) from None
    return target


def _compile(compiler: list[str], directory: Path) -> Path:
    objects, running = [], []
    for source in sources():
        target = directory / f"{source.stem}.o"
        command = [
            *compiler,
            *FLAGS,
            *VARIANT_FLAGS.get(source.name, ()),
            "-c",
            str(source),
            "-o",
            str(target),
        ]
        running.append(
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
        objects.append(str(target))
    told = [process.communicate(timeout=BUILD_LIMIT_S)[0].decode(errors="replace") for process in running]
    for process, text in zip(running, told, strict=True):
        if process.returncode:
            raise KernelUnavailable(f"{compiler[0]} failed: {_first_error(text)}")
    linked = directory / "step.so"
    done = subprocess.run(
        [*compiler, "-shared", "-pthread", *objects, "-o", str(linked)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BUILD_LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise KernelUnavailable(f"{compiler[0]} failed: {_first_error(done.stderr)}")
    return linked


def _first_error(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "without a word")


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(
            [*compiler, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelUnavailable(f"{compiler[0]} --version failed: {error}") from None
    return done.stdout


def _digest(compiler: list[str]) -> str:
    told = hashlib.sha256(
        repr((FLAGS, VARIANT_FLAGS, _version(tuple(compiler)), platform.machine())).encode()
    )
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cc", ".h"):
            told.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return told.hexdigest()[:16]


if __name__ == "__main__":
    print(build())
