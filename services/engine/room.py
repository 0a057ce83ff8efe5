"""How much memory this machine has left for an engine, and how many KV blocks that makes.

    room     what the kernel says could be taken now, here or in the tightest control group around us
    margin   what stays free of it: activations, and everybody else
    blocks   those asked for, or refused with the number that would fit; none asked for: a share of the room

Asked before weights are read, and again before the pool is made, in turn with other engines of this machine:
the kernel promises memory that it does not have, and who is killed for it need not be us. A pool takes its
memory as it is used: what others here have been promised and have not taken yet counts as taken, and before
each part the margin is looked at again. Owns that arithmetic and the reading of /proc and of control groups;
knows no model.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from microserve.kvcache.heap.memfd import HEAP_NAME
from microserve.protocol.errors import ConfigError

MIN_MARGIN_NBYTES = 512 << 20
MARGIN_SHARE = 1 / 32
"""Of all memory; or ``MIN_MARGIN_NBYTES``, if that is more."""
HOST_SHARE = 1 / 4
"""Of what is left, for the pools of all engines of a machine, where nobody says how large they are to be."""
DEVICE_SHARE = 0.9
MAX_HOST_POOL_NBYTES = 8 << 30
"""Where nobody says: a CPU reads a sequence's whole KV for every token, and taking more takes long."""
MIN_BLOCKS = 16
"""Where nobody says; an engine with fewer is of no use."""
TURN_S = 60.0
"""Longest wait for another engine that takes its pool."""
PACKED_SUFFIX = ".packed"
"""Of files of packed weights."""
_TURN_POLL_S = 0.05
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Room:
    """Memory that could be taken now."""

    nbytes: int
    total_nbytes: int
    of: str
    """Whose it is, in words."""

    @property
    def margin_nbytes(self) -> int:
        return max(MIN_MARGIN_NBYTES, int(self.total_nbytes * MARGIN_SHARE))


@dataclass(frozen=True, slots=True)
class Pool:
    """What is wanted of the room."""

    num_blocks: int
    """0: as many as are good."""
    block_nbytes: int
    """In all layers."""
    useful_blocks: int
    """All that sequences could hold at a time."""
    share: float
    """Of what is left, for ``num_blocks`` 0."""
    max_nbytes: int | None = None
    """For ``num_blocks`` 0."""


def num_blocks_in(room: Room, pool: Pool, *, weights_nbytes: int = 0) -> int:
    """``weights_nbytes``: of those that are yet to be loaded. Raises :class:`ConfigError` (field
    ``kvcache.num_blocks``, or ``model.path`` where not even the weights fit) with the figure that fits."""
    left = room.nbytes - room.margin_nbytes - weights_nbytes
    fits = max(0, left // pool.block_nbytes)
    has = f"{room.of} has {_gib(room.nbytes)} left, of which {_gib(room.margin_nbytes)} are kept free"
    if weights_nbytes:
        has += f" and {_gib(weights_nbytes)} are for weights"
    if left < 0:
        raise ConfigError(f"model.path: there is no room for this model: {has}", field="model.path")
    wanted = pool.num_blocks
    if not wanted:
        share = int(left * pool.share)
        if pool.max_nbytes is not None:
            share = min(share, pool.max_nbytes)
        wanted = max(MIN_BLOCKS, min(share // pool.block_nbytes, pool.useful_blocks))
    if wanted > fits:
        raise ConfigError(
            f"kvcache.num_blocks: {wanted} blocks take {_gib(wanted * pool.block_nbytes)}; {has}: at most "
            f"{fits} blocks fit",
            field="kvcache.num_blocks",
        )
    return wanted


def _gib(nbytes: int) -> str:
    return f"{nbytes / _GIB:,.2f} GiB"


# --- what the kernel says --------------------------------------------------------------------------


def unpromised_room(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> Room:
    """:func:`host_room` without what heaps on this machine may still take."""
    room = host_room(proc, groups)
    return replace(room, nbytes=max(0, room.nbytes - _promised_nbytes(proc)))


def _promised_nbytes(proc: Path) -> int:
    """Of the heaps of this user's engines (another one's cannot be seen): their size, less what they have.
    And their mapped weights, which the kernel would count as pages that could go."""
    promised: dict[int, int] = {}
    for link in _open_files(proc):
        with suppress(OSError):
            target = os.readlink(link)
            if target.startswith(f"/memfd:{HEAP_NAME} "):
                stat = link.stat()
                promised[stat.st_ino] = max(0, stat.st_size - stat.st_blocks * 512)
            elif target.removesuffix(" (deleted)").endswith(PACKED_SUFFIX):
                stat = link.stat()
                promised[stat.st_ino] = stat.st_size
    return sum(promised.values())


def _open_files(proc: Path) -> Iterator[Path]:
    """``/proc/<pid>/fd/<fd>`` of all processes. One that ends meanwhile is left out; a glob would raise."""
    for process in os.listdir(proc):
        if process.isdigit():
            with suppress(OSError):
                directory = proc / process / "fd"
                yield from [directory / name for name in os.listdir(directory)]


def host_room(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> Room:
    """The least of what the machine and each control group around this process have left."""
    memory = _numbers(proc / "meminfo", ":")
    rooms = [Room(memory["MemAvailable"] << 10, memory["MemTotal"] << 10, "this machine")]
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            rooms += _group_rooms(groups, path, ("memory.max", "memory.current"))
        elif "memory" in controllers.split(","):
            rooms += _group_rooms(groups / "memory", path, ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    return min(rooms, key=lambda room: room.nbytes)


def _group_rooms(root: Path, path: str, names: tuple[str, str]) -> Iterator[Room]:
    """Of a group and those around it, as far as they have a limit."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        group = root.joinpath(*parts[:depth])
        limit, used = (next(iter(_lines(group / name)), "") for name in names)
        if limit.isdigit() and used.isdigit():
            # Pages of files go when somebody needs the memory. Shared memory is not among them.
            stat = _numbers(group / "memory.stat", " ")
            files = stat.get("inactive_file", 0) + stat.get("active_file", 0)
            left = max(0, int(limit) - max(0, int(used) - files))
            yield Room(left, int(limit), f"the control group /{'/'.join(parts[:depth])}")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


def _numbers(path: Path, border: str) -> dict[str, int]:
    """``name<border> number ...`` by name."""
    found = {}
    for line in _lines(path):
        name, _, rest = line.partition(border)
        if value := rest.split():
            found[name] = int(value[0])
    return found


# --- taking it -------------------------------------------------------------------------------------


def require_margin(nbytes: int) -> None:
    """Before so much more of a pool is taken: others may have taken theirs since it was planned. Raises
    :class:`ConfigError` (field ``num_blocks``)."""
    room = host_room()
    if room.nbytes - nbytes < room.margin_nbytes // 2:
        raise ConfigError(
            f"{room.of} has only {_gib(room.nbytes)} left while the pool is taken", field="num_blocks"
        )


@asynccontextmanager
async def turn() -> AsyncIterator[None]:
    """One engine at a time looks and takes: of two at once each would see all of the room."""
    descriptor = os.open(__file__, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(TURN_S):
                while not _lock(descriptor):  # noqa: ASYNC110  (the lock is another process's)
                    await asyncio.sleep(_TURN_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: nobody takes turns there
        return True
    return True
