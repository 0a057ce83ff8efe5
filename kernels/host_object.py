"""Small C++ sources of ours as a shared object: prebuilt in the package, or compiled once and cached.

Owns which object is taken, and that it is whole and nobody else's. Must not know what is in it nor how it is
loaded; flags and include directories are its owner's. (The CPU step, which takes half a minute and is many
sources, has ``cpu/build.py``.) Needs the standard library only.

    NAME-SOURCES-COMPILER.so     each a digest; SOURCES with flags and kind of machine
"""

from __future__ import annotations

import hashlib
import os
import platform
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from microserve.kernels.cpu.compiler import Compiler, find_compilers
from microserve.kernels.kernel_cache import KernelUnavailable, cache_directory

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti")
BUILD_LIMIT_S = 60.0
"""Of a second's work, on a machine that may be busy."""
CLI_LIMIT_S = 1200.0
"""Somebody looks on; and ziglang makes its own libraries first."""


@dataclass(frozen=True)
class HostSource:
    """One C++ file, and what it includes of ours."""

    name: str
    file: Path
    headers: tuple[Path, ...] = ()
    foreign: Path | None = None
    """A header of somebody else's that it includes; it may be missing where nothing is compiled."""
    flags: tuple[str, ...] = ()
    """Of its own, beside ``FLAGS``."""

    @property
    def digest(self) -> str:
        told = hashlib.sha256(repr((FLAGS + self.flags, platform.machine())).encode())
        for path in (self.file, *self.headers):
            told.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return told.hexdigest()[:16]

    @property
    def prebuilt(self) -> Path:
        """Where an object lies that came with the package."""
        return self.file.parent / "prebuilt"


def build(source: HostSource, environment: Mapping[str, str] = os.environ) -> Path:
    """The shared object: prebuilt, from the cache, or from the first compiler that can.

    Any number of processes may build it at once. Raises :class:`KernelUnavailable`."""
    directory, stem = cache_directory(environment), f"{source.name}-{source.digest}"
    if found := _found(source.prebuilt, stem, is_ours=True) or _found(directory, stem):
        return found
    if source.foreign is not None and not source.foreign.is_file():
        raise KernelUnavailable(f"{source.name} is not built: no {source.foreign}")
    failure: Exception | None = None
    for compiler in find_compilers(environment):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            return compile_into(source, compiler, directory, environment)
        except (KernelUnavailable, OSError, subprocess.SubprocessError) as error:
            failure = error
    raise KernelUnavailable(f"{source.name} is not built: {failure}")


def compile_into(
    source: HostSource,
    compiler: Compiler,
    directory: Path,
    environment: Mapping[str, str] = os.environ,
    limit_s: float = BUILD_LIMIT_S,
) -> Path:
    """``limit_s``: for compiling, and again for linking.

    Raises :class:`KernelUnavailable`, ``OSError`` and ``subprocess.SubprocessError``."""
    target = directory / f"{source.name}-{source.digest}-{compiler.digest}.so"
    with tempfile.TemporaryDirectory(dir=directory, prefix=f".{source.name}-") as name:
        part, whole = Path(name) / "part.o", Path(name) / "whole.so"
        include = [f"-I{source.foreign.parent}"] if source.foreign else []
        around = {
            **environment,
            **dict.fromkeys(("TMPDIR", "ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"), name),
        }
        flags = [*FLAGS, *source.flags, *include]
        _run(
            compiler.name,
            [*compiler.compile, *flags, "-c", str(source.file), "-o", str(part)],
            around,
            limit_s,
        )
        # What is undefined is Python's, which is there when it is loaded.
        undefined = ["-Wl,-z,undefs"] if source.foreign and sys.platform == "linux" else []
        link = [*compiler.link, "-shared", *undefined]
        _run(compiler.name, [*link, str(part), "-o", str(whole)], around, limit_s)
        os.chmod(whole, 0o755)  # one user may install what another one runs
        os.replace(whole, target)
    return target


def put(source: HostSource, directory: Path, compiler: Compiler | None = None) -> Path:
    """The object in that directory, by ``compiler`` or else by the best there is, and older ones away.

    Raises as :func:`compile_into`."""
    directory.mkdir(parents=True, exist_ok=True)
    compiler = compiler or find_compilers(os.environ)[0]
    path = compile_into(source, compiler, directory, limit_s=CLI_LIMIT_S)
    for other in directory.glob(f"{source.name}-*.so"):
        if other != path:
            other.unlink()
    return path


def _found(directory: Path, stem: str, is_ours: bool = False) -> Path | None:
    """By whatever compiler; of a cache only what no other user could have written."""
    for path in sorted(directory.glob(f"{stem}-*.so")):
        status = path.stat()
        is_safe = status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if is_ours or (is_safe and not path.is_symlink()):
            return path
    return None


def _run(name: str, command: Sequence[str], environment: Mapping[str, str], limit_s: float) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=limit_s,
        check=False,
        env=environment,
    )
    if done.returncode:
        raise KernelUnavailable(f"{name} failed: {done.stderr.strip().partition(chr(10))[0]}")
