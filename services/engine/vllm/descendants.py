"""All that this process has started, and what those have: ended at once, whatever they are doing.

vLLM that is starting does not listen: its processes look at nothing until they have loaded, and know only
then that they are to end with us (connector/lifeline.py). So whoever gives up a start kills them.

Owns how they are found and ended. Knows nothing of what they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import time
from collections.abc import Collection
from pathlib import Path
from typing import Final

_PR_SET_CHILD_SUBREAPER: Final = 36


def adopt_orphans() -> None:
    """From now on a process whose parent has ended becomes ours, if it descends from us: none is lost."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def kill_descendants(spared: Collection[int], *, timeout_s: float) -> bool:
    """Behind :func:`adopt_orphans`. Returns when none is left (they are not reaped), or False after
    ``timeout_s``. ``spared``: children that end by themselves."""
    until = time.monotonic() + timeout_s
    ended: set[int] = set()
    while left := [pid for pid in _children() if pid not in spared and pid not in ended]:
        for pid in left:
            if not _kill(pid, until - time.monotonic()):
                return False
            ended.add(pid)  # what it had started is ours by now
    return True


def _kill(pid: int, timeout_s: float) -> bool:
    """A child, and wait for all of its threads: one that only looks dead may still have children."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            return bool(select.select([descriptor], [], [], max(0.0, timeout_s))[0])
        finally:
            os.close(descriptor)
    return True


def _children() -> list[int]:
    """Of this process, with those that have ended and nobody has waited for."""
    ours = str(os.getpid())
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # Behind the last bracket: a name may have brackets of its own.
                if entry.joinpath("stat").read_text().rpartition(")")[2].split()[1] == ours:
                    found.append(int(entry.name))
    return found
