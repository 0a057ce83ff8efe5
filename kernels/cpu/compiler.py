"""C++ compilers: which ones this machine has, and the native step as a shared object by one of them.

Owns flags, targets and child processes, which end with the call. Must not know where objects are kept
(``build.py``) nor what is computed; needs the standard library only.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from microserve.kernels.kernel_cache import KernelUnavailable

SOURCES = Path(__file__).parent / "native"
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    # Which FMAs there are is written in the sources, and not for the compiler to choose.
    *("-ffp-contract=off", "-fno-math-errno"),
)
AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
BF16_FLAGS = ("-mavx512bf16", "-mavx512vbmi")
AMX_FLAGS = ("-mamx-tile", "-mamx-bf16", "-mavx512vbmi")
PROBES = (
    (BF16_FLAGS, "__m512 probe(__m512 a, __m512bh b) { return _mm512_dpbf16_ps(a, b, b); }"),
    (AMX_FLAGS, "void probe() { _tile_loadd(0, nullptr, 64); _tile_dpbf16ps(0, 1, 2); }"),
)
"""Flags that an older compiler does not know, and what needs them: without them the variant is left empty."""
VARIANT_FLAGS = {
    "avx2.cc": ("-mavx2", "-mfma"),
    "avx512.cc": AVX512_FLAGS,
    "avx512bf16.cc": (*AVX512_FLAGS, *BF16_FLAGS),
    "amx.cc": (*AVX512_FLAGS, *AMX_FLAGS),
}
LINK_FLAGS = (
    *("-shared", "-pthread"),
    # Of the C++ library nothing is needed: what needed it would be told here, and not where it is loaded.
    *(("-Wl,--as-needed", "-Wl,--strip-debug", "-Wl,-z,defs") if sys.platform == "linux" else ()),
)
X86 = ("x86_64", "AMD64")
SYSTEM_COMPILERS = ("c++", "g++", "clang++")
OLDEST_GLIBC = "2.28"
"""That objects of zig run on: torch's own floor."""
ASK_LIMIT_S = 60.0
MISSING = "no C++ compiler: install g++ or clang++, or the package ziglang"


@dataclass(frozen=True)
class Compiler:
    """Of a working ``--version``; whether it compiles is seen when it does."""

    name: str
    compile: tuple[str, ...]
    link: tuple[str, ...]
    version: str
    """Equal versions with equal commands make equal objects."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.version.encode()).hexdigest()[:8]


def find_compilers(environment: Mapping[str, str]) -> list[Compiler]:
    """``$CXX`` alone where it is set, else the system's and then that of the package ``ziglang``, best first.

    Raises :class:`KernelUnavailable` where there is none.
    """
    path = environment.get("PATH", os.defpath)
    named = shlex.split(environment.get("CXX", ""))
    if named:
        return [_system_compiler(tuple(named))]
    found: list[Compiler] = []
    seen = set()
    for name in SYSTEM_COMPILERS:
        place = shutil.which(name, path=path)
        if place is None or (real := os.path.realpath(place)) in seen:
            continue
        seen.add(real)
        try:
            found.append(_system_compiler((place,)))
        except KernelUnavailable:  # half of one; the next may be whole
            continue
    if (zig := find_zig()) is not None:
        found.append(zig)
    if not found:
        raise KernelUnavailable(MISSING)
    return found


def find_zig() -> Compiler | None:
    """The clang in the package ``ziglang``. It compiles for any glibc from ``OLDEST_GLIBC`` on."""
    spec = find_spec("ziglang")
    program = Path(spec.origin).parent / "zig" if spec is not None and spec.origin else None
    if program is None or not program.is_file() or sys.platform != "linux":
        return None
    target = ("-target", f"{platform.machine()}-linux-gnu.{OLDEST_GLIBC}")
    version = f"ziglang {metadata.version('ziglang')} {target}"
    # The C driver links: the C++ one would build a C++ library first, which takes a minute and is not needed.
    return Compiler("ziglang", (str(program), "c++", *target), (str(program), "cc", *target), version)


def source_files(machine: str = platform.machine()) -> list[Path]:
    """What is compiled on a machine."""
    found = sorted(SOURCES.rglob("*.cc"))
    return [path for path in found if machine in X86 or path.name not in VARIANT_FLAGS]


def sources_digest() -> str:
    """Of all that decides what is computed but the compiler: sources, flags and kind of machine."""
    told = hashlib.sha256(repr((FLAGS, VARIANT_FLAGS, LINK_FLAGS, platform.machine())).encode())
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in (".cc", ".h"):
            told.update(path.relative_to(SOURCES).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return told.hexdigest()[:16]


def compile_object(
    compiler: Compiler, directory: Path, limit_s: float, environment: Mapping[str, str] = os.environ
) -> bytes:
    """The shared object. ``directory``: empty, for all that lies between; it must be writable.

    Raises :class:`KernelUnavailable` with what the compiler said first, or with ``limit_s`` when it took
    longer; either way all that was started has ended.
    """
    end = time.monotonic() + limit_s
    around = {
        **environment,
        "LC_ALL": "C",
        **dict.fromkeys(("TMPDIR", "ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"), str(directory)),
    }
    commands, parts = [], []
    linked = directory / "step.so"
    try:
        without = _unknown_flags(compiler, directory, around, end)
        for source in source_files():
            part = str(directory / f"{source.stem}.o")
            flags = [*FLAGS, *(flag for flag in VARIANT_FLAGS.get(source.name, ()) if flag not in without)]
            commands.append([*compiler.compile, *flags, "-c", str(source), "-o", part])
            parts.append(part)
        _run(compiler.name, commands, around, end)
        _run(compiler.name, [[*compiler.link, *LINK_FLAGS, *parts, "-lm", "-o", str(linked)]], around, end)
        return linked.read_bytes()
    except subprocess.TimeoutExpired:
        raise KernelUnavailable(f"{compiler.name} took more than {limit_s:.0f} s") from None
    except OSError as error:
        raise KernelUnavailable(f"{compiler.name} cannot be run: {error.strerror}") from None


def _unknown_flags(
    compiler: Compiler, directory: Path, environment: Mapping[str, str], end: float
) -> set[str]:
    """Of ``PROBES``, those that compiler or assembler are too old for."""
    unknown: set[str] = set()
    for flags, text in PROBES if platform.machine() in X86 else ():
        source, target = directory / "probe.cc", directory / "flags.probe"
        source.write_text(f"#include <immintrin.h>\n{text}\n")
        command = [*compiler.compile, *FLAGS, *AVX512_FLAGS, *flags, "-c", str(source), "-o", str(target)]
        try:
            _run(compiler.name, [command], environment, end)
        except KernelUnavailable:
            unknown |= set(flags)
    return unknown


def _run(name: str, commands: Sequence[Sequence[str]], environment: Mapping[str, str], end: float) -> None:
    """All at once, each with its children in a group of its own, so that none outlives this."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            running.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    process_group=0,
                )
            )
        for process in running:
            told = process.communicate(timeout=max(0.0, end - time.monotonic()))[0]
            if process.returncode:
                raise KernelUnavailable(f"{name} failed: {_reason(process.returncode, told)}")
    finally:
        for process in running:
            if process.returncode is None:  # not waited for yet: the group is still its own
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


def _reason(code: int, told: bytes) -> str:
    lines = [line for line in told.decode(errors="replace").splitlines() if line.strip()]
    if found := next((line for line in lines if "error" in line.lower()), None) or next(iter(lines), None):
        return found
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}, without a word"


_versions: dict[tuple[str, ...], Compiler] = {}


def _system_compiler(command: tuple[str, ...]) -> Compiler:
    """Asked once a process. Raises :class:`KernelUnavailable`."""
    if command not in _versions:
        try:
            done = subprocess.run(
                [*command, "--version"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=ASK_LIMIT_S,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise KernelUnavailable(f"{shlex.join(command)} --version failed: {error}") from None
        name = Path(command[-1]).name if len(command) == 1 else shlex.join(command)
        _versions[command] = Compiler(name, command, command, done.stdout)
    return _versions[command]
