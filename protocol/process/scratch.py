"""A directory of one process in the temporary directory, which goes with it, however that ends.

For sockets that must have names. Its owner holds a lock in it as long as it lives; whoever sweeps removes
what nobody holds: the supervisor when a child has ended, and each owner before it makes its own. No pid takes
part: a lock is right between namespaces too, and after a pid is used again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "microserve-scratch-"
_LOCK = "lock"


class Scratch:
    """Made empty, for this user alone; ``close`` removes it."""

    def __init__(self) -> None:
        """Raises ``OSError``."""
        sweep()
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        # A sweeper takes no directory for left behind that has no lock yet, so it comes there locked.
        unlocked = self.path / f"{_LOCK}.new"
        self._lock = os.open(unlocked, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unlocked.rename(self.path / _LOCK)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def sweep() -> None:
    """Remove those of this user whose owner is no more. What cannot be removed, or looked at, is left: never
    raises ``OSError``."""
    with contextlib.suppress(OSError):  # no temporary directory is to be had: the disk is full
        for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
            with contextlib.suppress(OSError):
                _remove_if_left(lock)


def _remove_if_left(lock: Path) -> None:
    if lock.lstat().st_uid != os.getuid():
        return
    descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(lock.parent, ignore_errors=True)
    finally:
        os.close(descriptor)
