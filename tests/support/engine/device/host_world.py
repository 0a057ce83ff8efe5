"""A world of NVSHMEM inside one process, over host_driver.py: one rank for each driver."""

from __future__ import annotations

from dataclasses import dataclass, field

from microserve.protocol.errors import InternalError
from tests.support.engine.device.host_driver import HostDriver


@dataclass
class HostWorld:
    num_ranks: int
    name: str = "world"
    handles: dict[int, bytes] = field(default_factory=dict)
    """By rank, of its symmetric memory."""
    unmapped: set[int] = field(default_factory=set)
    """Ranks that are reached in another way than by mapping."""

    def join(self, driver: HostDriver) -> HostRank:
        return HostRank(self, len(self.handles), driver)


class HostRank:
    """Addresses are our own and inside the symmetric memory, or it is an error."""

    def __init__(self, world: HostWorld, rank: int, driver: HostDriver) -> None:
        if rank >= world.num_ranks:
            raise InternalError(f"the world has {world.num_ranks} ranks")
        self._world = world
        self._driver = driver
        self._mapped: dict[int, int] = {}
        self.name = world.name
        self.rank = rank
        self.num_ranks = world.num_ranks

    def allocate(self, nbytes: int) -> int:
        self._base, self._nbytes = self._driver.allocate(nbytes), nbytes
        self._world.handles[self.rank] = self._driver.export(self._base)
        return self._base

    def barrier(self) -> None:
        """Ranks of these tests come one after the other."""

    def mapped_address(self, address: int, rank: int) -> int:
        return 0 if rank in self._world.unmapped else self._reach(address, 0, rank)

    def put(self, target: int, source: int, nbytes: int, rank: int, stream: int) -> None:
        self._driver.copy(self._reach(target, nbytes, rank), source, nbytes, stream)

    def get(self, target: int, source: int, nbytes: int, rank: int, stream: int) -> None:
        self._driver.copy(target, self._reach(source, nbytes, rank), nbytes, stream)

    def signal(self, word: int, value: int, rank: int, stream: int) -> None:
        self._driver.write_values([self._reach(word, 8, rank)], value, stream)

    def quiet(self, stream: int) -> None:
        """Streams do one thing after the other here."""

    def leave(self) -> None:
        raise InternalError("these ranks do not leave")

    def _reach(self, address: int, nbytes: int, rank: int) -> int:
        offset = address - self._base
        if not 0 <= offset <= offset + nbytes <= self._nbytes:
            raise InternalError(f"{address:#x} is not our own symmetric memory")
        if rank not in self._mapped:
            self._mapped[rank] = (
                self._base if rank == self.rank else self._driver.open(self._world.handles[rank])
            )
        return self._mapped[rank] + offset
