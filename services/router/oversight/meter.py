"""What this process uses, read where it stands: in a signal's handler, so without allocating descriptors.

Owns two files of /proc. What cannot be read counts as nothing: bookkeeping is no reason to fail.
"""

from __future__ import annotations

import os

_PAGE_NBYTES = os.sysconf("SC_PAGE_SIZE")


class Meter:
    """Of the process and its main thread; ``close`` it."""

    def __init__(self) -> None:
        self._memory = _open("/proc/self/statm")
        self._schedule = _open("/proc/self/schedstat")

    def resident_mb(self) -> int:
        """Memory that it has."""
        return _field(self._memory, 1) * _PAGE_NBYTES >> 20

    def starved_s(self) -> float:
        """Seconds in all in which the main thread could have run, and others did."""
        return _field(self._schedule, 1) / 1e9

    def close(self) -> None:
        for descriptor in (self._memory, self._schedule):
            if descriptor >= 0:
                os.close(descriptor)


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _field(descriptor: int, number: int) -> int:
    try:
        return int(os.pread(descriptor, 128, 0).split()[number])
    except (OSError, ValueError, IndexError):
        return 0
