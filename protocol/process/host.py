"""Reads what a service says of its machine: clock, limits, shared memory. Owns the calls; judges nothing."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable

from microserve.protocol.messages.host import HostFacts
from microserve.protocol.process.limits import descriptor_limit, num_descriptors

SHM = "/dev/shm"
_NO_LIMIT = -1


def host_facts(wall_clock: Callable[[], float] = time.time) -> HostFacts:
    """Of this process, now. A machine without ``/dev/shm`` says nothing of it."""
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    try:
        shm = os.statvfs(SHM)
    except OSError:
        shm = None
    return HostFacts(
        wall_s=wall_clock(),
        num_descriptors=num_descriptors(),
        max_descriptors=_limit(descriptor_limit()),
        max_locked_nbytes=_limit(locked),
        shm_nbytes=shm.f_blocks * shm.f_frsize if shm else 0,
        shm_free_nbytes=shm.f_bavail * shm.f_frsize if shm else 0,
    )


def _limit(value: int) -> int:
    return _NO_LIMIT if value == resource.RLIM_INFINITY else value
