"""Many small copies between two mappings of memory in one native call; see ``host_copy.cc`` for why.

Owns how the object is built (once, by the compiler that builds the CPU step, into the same cache) and its
call. Must not know what is copied. Where there is no compiler there is no copier: callers copy by slices.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from microserve.kernels.cpu.compiler import Compiler, find_compilers
from microserve.kernels.kernel_cache import KernelUnavailable, cache_directory

SOURCE = Path(__file__).parent / "host_copy.cc"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti")
BUILD_LIMIT_S = 60.0
"""Of a second's work, on a machine that may be busy."""

SpanCopier = Callable[[int, int, int, int], None]
"""Addresses of target, source and spans, and the number of spans. A span is three int64: source offset,
target offset, bytes. Whoever sees a later store sees all of these."""


def build(environment: Mapping[str, str] = os.environ) -> Path:
    """The shared object, from the cache or from the first compiler that can.

    Any number of processes may build it at once. Raises :class:`KernelUnavailable`."""
    directory, failure = cache_directory(environment), None
    for compiler in find_compilers(environment):
        digest = hashlib.sha256(f"{FLAGS}{platform.machine()}".encode() + SOURCE.read_bytes()).hexdigest()
        target = directory / f"host-copy-{digest[:16]}-{compiler.digest}.so"
        if target.is_file():
            return target
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=directory, prefix=".host-copy-") as name:
                built = _compiled(compiler, Path(name), environment)
                os.chmod(built, 0o755)
                os.replace(built, target)
        except (KernelUnavailable, OSError, subprocess.SubprocessError) as error:
            failure = error
            continue
        return target
    raise KernelUnavailable(f"no copier: {failure}")


def _compiled(compiler: Compiler, directory: Path, environment: Mapping[str, str]) -> Path:
    part, whole = directory / "host_copy.o", directory / "host_copy.so"
    caches = dict.fromkeys(("TMPDIR", "ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"), str(directory))
    for command in (
        [*compiler.compile, *FLAGS, "-c", str(SOURCE), "-o", str(part)],
        [*compiler.link, "-shared", str(part), "-o", str(whole)],
    ):
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BUILD_LIMIT_S,
            check=False,
            env={**environment, **caches},
        )
        if done.returncode:
            raise KernelUnavailable(f"{compiler.name} failed: {done.stderr.strip().partition(chr(10))[0]}")
    return whole


@functools.cache
def span_copier() -> SpanCopier | None:
    """None where it cannot be built or loaded. It keeps the interpreter's lock: a copy takes microseconds,
    and getting the lock back beside a busy thread may take milliseconds."""
    try:
        function = ctypes.PyDLL(str(build())).ms_copy_spans
    except (KernelUnavailable, OSError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None

    def copy(target: int, source: int, spans: int, count: int) -> None:
        function(target, source, spans, count)

    return copy
