"""vLLM's processes end with the process that started them, whatever way that goes.

The kernel sends the signal when the *thread* that started a process ends: a front starts vLLM from a thread
that lives as long as it does.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def end_with_parent() -> None:
    """In a child of multiprocessing: be killed when the parent is; at once if it is gone by now. In a process
    that nobody started so (vLLM in the front's own process): nothing."""
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent.pid:  # it died before the kernel was told to watch it
        os.kill(os.getpid(), signal.SIGKILL)
