"""What the system gives a process before it serves: descriptors, and streams to stand in for missing ones.

Owns the calls; knows no service.
"""

from __future__ import annotations

import contextlib
import os
import resource


def raise_descriptor_limit() -> int:
    """Soft limit of descriptors up to the hard one; returns what holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return hard
    return soft


def descriptor_limit() -> int:
    """As it is now."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def num_descriptors() -> int:
    """That this process has open; 0 when that cannot be told."""
    with contextlib.suppress(OSError):
        return len(os.listdir("/proc/self/fd"))
    return 0


def fill_standard_streams() -> None:
    """Descriptors 0, 1 and 2 exist: a library that writes to a closed one would write into a socket of
    ours."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                opened = os.open(os.devnull, os.O_RDWR)
                if opened != number:
                    os.dup2(opened, number)
                    os.close(opened)
