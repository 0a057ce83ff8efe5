"""Which kind of heap a pair of engines uses: the fastest that reaches from the one to the other.

Owns the order of preference. Opens nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from microserve.protocol.errors import TransferFailed

_BY_SPEED: Final = ("nvshmem", "cuda_ipc", "shm")


@dataclass(frozen=True, slots=True)
class Reach:
    """How one engine's KV pool can be written."""

    kinds: frozenset[str]
    """Kinds of heap that it has or can make."""
    host: str
    """Kernel boot id, as in ``HeapAddress.host`` of heaps that stay on one host."""
    world: str = ""
    """Name of its NVSHMEM world; empty outside of any."""


def choose_kind(mine: Reach, theirs: Reach) -> str:
    """``nvshmem`` inside one world, else ``cuda_ipc``, else ``shm``, both on one host.

    :class:`TransferFailed` if none of them reaches.
    """
    is_reached = {
        "nvshmem": bool(mine.world) and mine.world == theirs.world,
        "cuda_ipc": mine.host == theirs.host,
        "shm": mine.host == theirs.host,
    }
    for kind in _BY_SPEED:
        if kind in mine.kinds & theirs.kinds and is_reached[kind]:
            return kind
    raise TransferFailed(
        f"no heap reaches from host {mine.host}, world {mine.world or 'none'}, with {sorted(mine.kinds)} "
        f"to host {theirs.host}, world {theirs.world or 'none'}, with {sorted(theirs.kinds)}"
    )
