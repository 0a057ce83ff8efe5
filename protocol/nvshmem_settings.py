"""The section ``[nvshmem]``: which world an engine joins, as which rank. For ``kvcache.heap = "nvshmem"``.

Owns its bounds. Does not know other sections: what depends on them is said by ``settings.py``.
"""

from __future__ import annotations

import msgspec

from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.world import MAX_WORLD_RANKS, fault_of_world

MAX_MEMORY_MB = 1 << 24
MAX_JOIN_TIMEOUT_S = 1e6
"""Far beyond use, and within what timers and messages can hold."""


class NvshmemSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    world: str = ""
    """Name that all engines of the world share, and no other world of the mesh."""
    rank: int = 0
    """Of this engine: each of 0 to ``num_ranks - 1`` once."""
    num_ranks: int = 0
    memory_mb: int = 0
    """Device memory that every rank takes, the same for all: room for the largest pool among them."""
    join_timeout_s: float = 120.0
    """From the model's being loaded until all ranks are there and have their heaps; then the process ends."""

    def check(self, *, curve_dir: str) -> None:
        """For an engine that is to have such a heap. Raises :class:`ConfigError` naming the path."""
        if fault := fault_of_world(self.world):
            raise ConfigError(f"nvshmem.world: {fault}", field="nvshmem.world")
        if not 1 <= self.num_ranks <= MAX_WORLD_RANKS:
            raise ConfigError(
                f"nvshmem.num_ranks must be 1 to {MAX_WORLD_RANKS}, is {self.num_ranks}",
                field="nvshmem.num_ranks",
            )
        if not 0 <= self.rank < self.num_ranks:
            raise ConfigError(
                f"nvshmem.rank must be 0 to {self.num_ranks - 1}, is {self.rank}", field="nvshmem.rank"
            )
        if self.memory_mb <= 0:
            raise ConfigError(
                f"nvshmem.memory_mb must be above 0 for kvcache.heap 'nvshmem', is {self.memory_mb}",
                field="nvshmem.memory_mb",
            )
        if self.memory_mb > MAX_MEMORY_MB:
            raise ConfigError(
                f"nvshmem.memory_mb must be at most {MAX_MEMORY_MB}, is {self.memory_mb}",
                field="nvshmem.memory_mb",
            )
        if self.join_timeout_s > MAX_JOIN_TIMEOUT_S:
            raise ConfigError(
                f"nvshmem.join_timeout_s must be at most {MAX_JOIN_TIMEOUT_S:.0f}, is {self.join_timeout_s}",
                field="nvshmem.join_timeout_s",
            )
        if not curve_dir:
            raise ConfigError(
                "bus.curve_dir must be set for kvcache.heap 'nvshmem': a world's unique id travels over "
                "authenticated sockets only (see 'microserve keys')",
                field="bus.curve_dir",
            )
