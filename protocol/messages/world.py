"""Rendezvous of the engines of one NVSHMEM world, on the index's channels (WIRE.md 6.5).

The unique id is a capability: whoever has it can join the world. It travels over CURVE only, is kept for the
time of one round, and shows in no ``repr``, no log and no error.
"""

from __future__ import annotations

import msgspec

MAX_WORLDS = 64
"""Worlds whose ranks wait at a time."""
MAX_WORLD_RANKS = 512
"""Ranks of one world: their holder words fit into a page."""
MAX_WORLD_CHARS = 64
"""Longest name of a world."""
MAX_UNIQUE_ID_NBYTES = 1024
"""Longest unique id; NVSHMEM's have 128 bytes."""
MAX_HOST_CHARS = 128


def fault_of_world(name: str) -> str:
    """What is wrong with it as the name of a world, in words; empty: nothing."""
    is_text = name.isprintable() and not any(letter.isspace() for letter in name)
    if is_text and 0 < len(name) <= MAX_WORLD_CHARS:
        return ""
    shown = repr(name[: MAX_WORLD_CHARS + 1])
    return f"a world's name is 1 to {MAX_WORLD_CHARS} printable characters without spaces, not {shown}"


class WorldRank(msgspec.Struct, frozen=True, array_like=True):
    """One life of one engine, and how those beside it can prove that it is over."""

    incarnation: int
    host: str
    """Kernel and pid namespace: ``process`` means something to those of the same one."""
    process: int
    """pid and start time in one word (kvcache/heap/process.py)."""


class _Message(msgspec.Struct, frozen=True, array_like=True):
    """Positional on the wire: fields are only ever appended, with defaults."""


# --- engine -> index -------------------------------------------------------------------------------


class JoinWorld(_Message, frozen=True, tag=10):
    """Wait for all ranks of a world -> ``WorldJoined``. The same call is repeated every interval: the
    repetition is the heartbeat of who waits."""

    call_id: int
    world: str
    rank: int
    num_ranks: int
    who: WorldRank
    unique_id: bytes
    """From rank 0, fresh; empty from the others."""
    memory_nbytes: int = 0
    """Of symmetric memory that each rank takes; all say the same."""

    def __repr__(self) -> str:
        return f"JoinWorld({self.call_id}, {self.world!r}, rank {self.rank} of {self.num_ranks})"


# --- index -> engine -------------------------------------------------------------------------------


class WorldJoined(_Message, frozen=True, tag=11):
    """All ranks are there, and all of them are told this at once."""

    call_id: int
    unique_id: bytes
    ranks: list[WorldRank]
    """By rank."""

    def __repr__(self) -> str:
        return f"WorldJoined({self.call_id}, {len(self.ranks)} ranks)"


class WorldWaiting(_Message, frozen=True, tag=12):
    """Not all are there yet: the index's sign of life. Answers no call."""

    world: str
    present: list[int]
    """Ranks that wait."""
