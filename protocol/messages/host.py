"""What a service says of the machine that it runs on, for who looks for what is wrong (WIRE.md 4.3).

Plain data; protocol/process/host.py reads it, services/command/doctor judges it.
"""

from __future__ import annotations

import msgspec


class HostFacts(msgspec.Struct, frozen=True, array_like=True):
    """As of the answer that it comes with. 0: not said, and of limits -1: none."""

    wall_s: float = 0.0
    """Its clock: seconds since 1970."""
    num_descriptors: int = 0
    """That the process has open."""
    max_descriptors: int = 0
    """``ulimit -n``, as the process has it."""
    max_locked_nbytes: int = 0
    """``ulimit -l``, in bytes."""
    shm_nbytes: int = 0
    """Of ``/dev/shm``."""
    shm_free_nbytes: int = 0


UNSAID_HOST = HostFacts()
