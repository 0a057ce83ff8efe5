"""The native step as a shared object: prebuilt in the package, or compiled once and cached.

Owns which object is taken, and that of many processes one compiles. Must not know compilers' flags
(``compiler.py``), which objects may be loaded (``objects.py``) nor what is computed; needs the standard
library only.

``python -m microserve.kernels.cpu.build`` builds it ahead of the first use (``--help``).
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from microserve.kernels.cpu.compiler import (
    Compiler,
    compile_object,
    find_compilers,
    find_zig,
    sources_digest,
)
from microserve.kernels.cpu.objects import PREBUILT, NativeObject, in_memory, keep, newest, prebuilt, stem
from microserve.kernels.kernel_cache import KernelUnavailable, cache_directory

BUILD_LIMIT_S = 120.0
"""For all of a build, and for waiting for another process's: shorter than an engine's start may take
(``mesh.ready_timeout_s``), which then computes by other means and is not killed."""
CLI_LIMIT_S = 1200.0
"""Somebody looks on, and the machine may be busy."""
LOOK_S = 0.1

Say = Callable[[str], None]


def build(
    environment: Mapping[str, str] = os.environ,
    say: Say = lambda _: None,
    limit_s: float = BUILD_LIMIT_S,
) -> NativeObject:
    """The prebuilt object of these sources, else the cached one, else a compiled one.

    Of any number of processes one compiles, and the others wait for it. Where there is no compiler, or none
    that can, what any has built serves; where the cache cannot be written, the object is this process's own.
    ``say`` is told what takes long. Raises :class:`KernelUnavailable`, with what is missing or what the
    compiler said first.
    """
    sources = sources_digest()
    if found := prebuilt(sources):
        return found
    try:
        return cached_or_compiled(find_compilers(environment), environment, say, limit_s)
    except KernelUnavailable:
        if found := newest(cache_directory(environment), sources):
            return found
        raise


def cached_or_compiled(
    compilers: Sequence[Compiler], environment: Mapping[str, str], say: Say, limit_s: float
) -> NativeObject:
    """By one of ``compilers``, the best first. Raises :class:`KernelUnavailable`."""
    cache, sources = cache_directory(environment), sources_digest()

    def cached() -> NativeObject | None:
        looked = (newest(cache, sources, compiler.digest) for compiler in compilers)
        return next((each for each in looked if each), None)

    if found := cached():
        return found
    end = time.monotonic() + limit_s
    with contextlib.ExitStack() as held:
        try:
            work = held.enter_context(_alone(cache, sources, end, limit_s, say))
        except OSError as error:
            say(f"the kernel cache {cache} cannot be used ({error.strerror}): compiles for itself alone")
            work = None
        if work and (found := cached()):
            return found
        compiler, content = _compile(compilers, work, end, environment, say)
        name = stem(sources, compiler.digest)
        if work:
            try:
                return keep(content, cache, name)
            except OSError as error:
                say(f"{cache} takes no object ({error.strerror}): it is kept in memory")
        return in_memory(content, name, f"compiled by {compiler.name}, in memory")


def _compile(
    compilers: Sequence[Compiler], work: Path | None, end: float, environment: Mapping[str, str], say: Say
) -> tuple[Compiler, bytes]:
    """By the first that can; ``work``: a directory for it, None for the system's."""
    failures = []
    for compiler in compilers:
        say(f"compiles with {compiler.name}, for half a minute or so")
        try:
            with tempfile.TemporaryDirectory(
                prefix="microserve-cpu-step-", dir=work, ignore_cleanup_errors=True
            ) as name:
                return compiler, compile_object(compiler, Path(name), end - time.monotonic(), environment)
        except KernelUnavailable as error:
            failures.append(str(error))
        except OSError as error:
            failures.append(f"no temporary directory to compile in: {error.strerror}")
        if time.monotonic() > end:
            break
    raise KernelUnavailable("; ".join(failures))


@contextmanager
def _alone(cache: Path, sources: str, end: float, limit_s: float, say: Say) -> Iterator[Path]:
    """One at a time of this user's processes, with an empty directory; the lock of one that died is free.

    Raises ``OSError`` where there can be no lock, :class:`KernelUnavailable` where it is not free in time.
    """
    cache.mkdir(parents=True, exist_ok=True)
    mine = f".cpu-step-{sources}.{os.geteuid()}"
    handle = os.open(cache / f"{mine}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        if os.fstat(handle).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "another user's lock is there")
        if not _try_lock(handle):
            say("waits for another process, which compiles it")
            while not _try_lock(handle):
                if time.monotonic() > end:
                    raise KernelUnavailable(f"another process has been compiling it for {limit_s:.0f} s")
                time.sleep(LOOK_S)  # a lock cannot be waited for with a bound
        work = cache / f"{mine}.work"
        shutil.rmtree(work, ignore_errors=True)  # of one that died
        work.mkdir(mode=0o700)
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def main(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> int:
    parser = argparse.ArgumentParser(prog="python -m microserve.kernels.cpu.build", description=__doc__)
    parser.add_argument("--ahead", action="store_true", help="say what is done, and fail in no case")
    parser.add_argument("--into", type=Path, metavar="DIR", help="put it there, and older ones away")
    parser.add_argument(
        "--package", dest="into", action="store_const", const=PREBUILT, help="into the package: for all users"
    )
    parser.add_argument("--zig", action="store_true", help="by the package ziglang, for glibc 2.28 and later")
    options = parser.parse_args(arguments)
    begin, told = time.monotonic(), []

    def say(text: str) -> None:
        told.append(text)
        print(f"== CPU kernels: {text}", file=sys.stderr, flush=True)

    try:
        if options.zig:
            if (zig := find_zig()) is None:
                raise KernelUnavailable("no ziglang in this environment")
            found = cached_or_compiled([zig], environment, say, CLI_LIMIT_S)
        else:
            found = build(environment, say, CLI_LIMIT_S)
        origin = found.origin
        if options.into:
            origin = str(_put(found, options.into))
    except (KernelUnavailable, OSError) as error:
        instead = "; engines compute through transformers" if options.ahead else ""
        print(f"== CPU kernels: none: {error}{instead}", file=sys.stderr)
        return 0 if options.ahead else 1
    if told and options.ahead:
        say(f"compiled in {time.monotonic() - begin:.0f} s")
    if not options.ahead:
        print(origin)
    return 0


def _put(found: NativeObject, directory: Path) -> Path:
    """Raises ``OSError``."""
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / found.name
    if not target.is_file() or target.read_bytes() != found.content:
        keep(found.content, directory, found.stem)
    for other in directory.glob("cpu-step-*.so"):
        if other.name != target.name:
            other.unlink()
    return target


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
