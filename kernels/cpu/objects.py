"""Objects of the native step on disk and in memory: what they are called, and which may be loaded.

Owns that each is whole and nobody else's: its name ends with the digest of its content, and what another user
could have written is not taken. Must not know how objects are made (``build.py``) nor what is in them.

    cpu-step-SOURCES-COMPILER-CONTENT.so     each a digest; SOURCES with the flags
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from microserve.kernels.kernel_cache import KernelUnavailable

PREBUILT = Path(__file__).parent / "prebuilt"
"""Objects that came with the package, or were installed into it; as trustworthy as this file."""


@dataclass(frozen=True, slots=True)
class NativeObject:
    """An object that is whole. Its descriptor stays open for good: what is loaded is the file that was
    checked, and the loader takes two files of one name for one."""

    name: str
    origin: str
    """Where it is from, in words."""
    descriptor: int
    digest: str
    """SHA-256 of its content."""

    @property
    def path(self) -> str:
        """For the loader, in this process only."""
        return f"/proc/self/fd/{self.descriptor}" if sys.platform == "linux" else self.origin

    @property
    def content(self) -> bytes:
        return os.pread(self.descriptor, os.fstat(self.descriptor).st_size, 0)

    @property
    def stem(self) -> str:
        return self.name.rpartition("-")[0]

    def copied(self) -> NativeObject:
        """In memory: a file system may forbid to execute what lies there."""
        return in_memory(self.content, self.stem, self.origin)


def stem(sources: str, compiler: str) -> str:
    return f"cpu-step-{sources}-{compiler}"


def prebuilt(sources: str, directory: Path | None = None) -> NativeObject | None:
    """The one that came with the package, if it is of these sources."""
    return newest(directory or PREBUILT, sources, is_ours=True)


def newest(directory: Path, sources: str, compiler: str = "*", is_ours: bool = False) -> NativeObject | None:
    """The newest that is whole, and that no other user could have written, or that is ours anyway."""
    try:
        found = sorted(
            directory.glob(f"{stem(sources, compiler)}-*.so"),
            key=lambda path: path.lstat().st_mtime,
            reverse=True,
        )
    except OSError:  # one has gone, or the folder cannot be read
        return None
    read = (_read(path, is_ours) for path in found)
    return next((each for each in read if each), None)


def _read(path: Path, is_ours: bool = False) -> NativeObject | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if is_ours else os.O_NOFOLLOW))
    except OSError:
        return None
    status = os.fstat(descriptor)
    is_safe = status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if stat.S_ISREG(status.st_mode) and (is_safe or is_ours):
        digest = hashlib.sha256(os.pread(descriptor, status.st_size, 0)).hexdigest()
        if path.stem.endswith(f"-{digest[:16]}"):
            return NativeObject(path.name, str(path), descriptor, digest)
    os.close(descriptor)
    return None


def in_memory(content: bytes, stem: str, origin: str) -> NativeObject:
    """Raises :class:`KernelUnavailable`."""
    if sys.platform != "linux":
        raise KernelUnavailable("the kernel cache cannot be used")
    try:
        descriptor = os.memfd_create("microserve-cpu-step")
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
    except OSError as error:
        raise KernelUnavailable(f"no room in memory for the native step: {error.strerror}") from None
    digest = hashlib.sha256(content).hexdigest()
    return NativeObject(f"{stem}-{digest[:16]}.so", origin, descriptor, digest)


def keep(content: bytes, directory: Path, stem: str) -> NativeObject:
    """Put an object where it is found from now on. Raises ``OSError``."""
    target = directory / f"{stem}-{hashlib.sha256(content).hexdigest()[:16]}.so"
    handle, partial = tempfile.mkstemp(dir=directory, prefix=f".{stem}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            os.fchmod(handle, 0o644)  # one user may install what another one runs
            file.flush()
            os.fsync(handle)
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
    if (kept := _read(target)) is None:
        raise FileNotFoundError(errno.EIO, "what was written there is not what is read")
    return kept
