"""The index's desk for NVSHMEM worlds: brings the ranks of a round together, then forgets it (WIRE.md 6.5).

    a rank asks, and again each interval ──> it waits ──all there──> every one gets the id and who they are
                                               │ silent, or its connection is gone: it has left

A connection is asked by sending to it: a socket refuses what is for a peer that is gone. So all who wait are
sent something just before the id is given out, and before a second claim to a rank is refused.

An id is given out once. A rank 0 that shows one again has missed the answer, or has not heard it yet: the
others meet by that id already, without those who would be new.

Owns the rounds, in memory and bounded. Does not know what a unique id is good for, and shows none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from microserve.protocol import log
from microserve.protocol.bus.peers import Listening
from microserve.protocol.errors import ConfigError, InvalidRequest, MeshError, QueueFull
from microserve.protocol.messages import index as wire
from microserve.protocol.messages.world import (
    MAX_HOST_CHARS,
    MAX_UNIQUE_ID_NBYTES,
    MAX_WORLD_RANKS,
    MAX_WORLDS,
    JoinWorld,
    WorldJoined,
    WorldRank,
    WorldWaiting,
    fault_of_world,
)

Send = Callable[[bytes, wire.IndexReply], bool]
MAX_GIVEN = 1024
"""Ids that were given out and are known by their digest: the latest."""

_logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Waiting:
    """One rank that waits."""

    peer: bytes
    call_id: int
    who: WorldRank
    heard: float
    """By :class:`Listening`."""


@dataclass(slots=True)
class _Round:
    num_ranks: int
    memory_nbytes: int
    waiting: dict[int, _Waiting] = field(default_factory=dict)
    """By rank."""
    unique_id: bytes = field(default=b"", repr=False)
    """Rank 0's, while it waits."""

    def present(self) -> list[int]:
        return sorted(self.waiting)

    def drop(self, rank: int) -> None:
        del self.waiting[rank]
        if rank == 0:
            self.unique_id = b""


class WorldDesk:
    def __init__(self, send: Send, *, has_keys: bool, interval_s: float, silence_s: float) -> None:
        """``send`` says whether the peer can be reached. ``has_keys``: the bus speaks CURVE."""
        self._send = send
        self._has_keys = has_keys
        self._silence_s = silence_s
        self._listening = Listening(interval_s)
        self._rounds: dict[str, _Round] = {}
        self._given: dict[bytes, None] = {}
        """Digests of the ids that were given out, the oldest first."""

    @property
    def num_waiting(self) -> int:
        """Ranks, of all worlds."""
        return sum(len(each.waiting) for each in self._rounds.values())

    @property
    def is_idle(self) -> bool:
        """Nobody waits."""
        return not self._rounds

    def join(self, peer: bytes, message: JoinWorld, now: float) -> None:
        """Let it wait, and answer all if it was the last. Raises a :class:`MeshError` naming the field: a
        round that it does not fit into goes on without it."""
        if _digest(message.unique_id) in self._given:  # no warning: mostly the answer has crossed it
            raise InvalidRequest(
                f"the unique id of world {message.world!r:.80} was given out already, and cannot be again",
                field="unique_id",
            )
        try:
            self._check(message)
            current = self._round_for(peer, message)
        except MeshError as error:
            _logger.warning(
                log.WORLD_REFUSED,
                incarnation=message.who.incarnation,
                rank=message.rank,
                code=error.code,
                error=error.detail,
            )
            raise
        heard = self._listening.time(now)
        current.waiting[message.rank] = _Waiting(peer, message.call_id, message.who, heard)
        if message.rank == 0:
            current.unique_id = message.unique_id
        if len(current.waiting) == current.num_ranks:
            self._leave_gone(message.world, current)
            if len(current.waiting) == current.num_ranks:
                self._form(message.world, current)
        else:
            self._send(peer, WorldWaiting(message.world, current.present()))

    def expire(self, now: float) -> None:
        """Ranks that have been silent have left. Call every interval."""
        listened = self._listening.look(now)
        for world, current in list(self._rounds.items()):
            for rank, each in list(current.waiting.items()):
                if listened - each.heard > self._silence_s:
                    current.drop(rank)
            self._forget_empty(world, current)

    def _check(self, message: JoinWorld) -> None:
        who = message.who
        if not self._has_keys:
            raise ConfigError(
                "a world's unique id travels over authenticated sockets only: the index has no bus.curve_dir",
                field="bus.curve_dir",
            )
        if fault := fault_of_world(message.world):
            raise InvalidRequest(fault, field="world")
        if not 1 <= message.num_ranks <= MAX_WORLD_RANKS:
            raise InvalidRequest(
                f"num_ranks is 1 to {MAX_WORLD_RANKS}, not {message.num_ranks}", field="num_ranks"
            )
        if not 0 <= message.rank < message.num_ranks:
            raise InvalidRequest(f"rank {message.rank} of {message.num_ranks}", field="rank")
        if message.memory_nbytes < 0:
            raise InvalidRequest(f"{message.memory_nbytes} bytes of memory", field="memory_nbytes")
        if len(who.host) > MAX_HOST_CHARS or who.incarnation <= 0 or who.process < 0:
            raise InvalidRequest("this is no rank's life", field="who")
        if len(message.unique_id) > MAX_UNIQUE_ID_NBYTES or bool(message.unique_id) != (message.rank == 0):
            raise InvalidRequest(
                f"rank 0 and nobody else brings a unique id, of at most {MAX_UNIQUE_ID_NBYTES} bytes",
                field="unique_id",
            )

    def _round_for(self, peer: bytes, message: JoinWorld) -> _Round:
        """The world's round, in which the rank is free for the sender."""
        world, rank = message.world, message.rank
        current = self._rounds.get(world)
        if current is not None and not self._fits(current, peer, message):
            self._leave_gone(world, current)
            current = self._rounds.get(world)
            if current is not None and not self._fits(current, peer, message):
                raise self._refusal(current, message)
        if current is None:
            if len(self._rounds) >= MAX_WORLDS:
                raise QueueFull(f"{MAX_WORLDS} worlds wait already", retry_after_s=self._silence_s)
            current = self._rounds[world] = _Round(message.num_ranks, message.memory_nbytes)
        elif not set(current.waiting) - {rank}:
            # Nobody else is there to disagree.
            current.num_ranks, current.memory_nbytes = message.num_ranks, message.memory_nbytes
        return current

    @staticmethod
    def _fits(current: _Round, peer: bytes, message: JoinWorld) -> bool:
        others = {rank: each for rank, each in current.waiting.items() if rank != message.rank}
        same = current.waiting.get(message.rank)
        life = message.who.incarnation
        return (
            (not others or current.num_ranks == message.num_ranks)
            and (not others or current.memory_nbytes == message.memory_nbytes)
            and (same is None or same.who.incarnation == life)
            and all(each.who.incarnation != life and each.peer != peer for each in others.values())
        )

    @staticmethod
    def _refusal(current: _Round, message: JoinWorld) -> InvalidRequest:
        world, rank = message.world, message.rank
        same = current.waiting.get(rank)
        if same is not None and same.who.incarnation != message.who.incarnation:
            return InvalidRequest(
                f"rank {rank} of world {world} is claimed by two living engines, "
                f"{same.who.incarnation:#x} and {message.who.incarnation:#x}",
                field="rank",
            )
        if current.num_ranks != message.num_ranks:
            return InvalidRequest(
                f"ranks {current.present()} wait for a world {world} of {current.num_ranks} ranks, "
                f"rank {rank} says {message.num_ranks}",
                field="num_ranks",
            )
        if current.memory_nbytes != message.memory_nbytes:
            return InvalidRequest(
                f"ranks {current.present()} wait for a world {world} of {current.memory_nbytes} bytes of "
                f"memory each, rank {rank} says {message.memory_nbytes}",
                field="memory_nbytes",
            )
        return InvalidRequest(f"one engine claims two ranks of world {world}", field="rank")

    def _leave_gone(self, world: str, current: _Round) -> None:
        """Those whose connection is gone have left."""
        notice = WorldWaiting(world, current.present())
        for rank, each in list(current.waiting.items()):
            if not self._send(each.peer, notice):
                current.drop(rank)
        self._forget_empty(world, current)

    def _forget_empty(self, world: str, current: _Round) -> None:
        if not current.waiting:
            del self._rounds[world]

    def _form(self, world: str, current: _Round) -> None:
        """All are told, at once; the round, and the id with it, is forgotten."""
        del self._rounds[world]
        self._given[_digest(current.unique_id)] = None
        if len(self._given) > MAX_GIVEN:
            del self._given[next(iter(self._given))]
        members = [current.waiting[rank] for rank in range(current.num_ranks)]
        ranks = [each.who for each in members]
        told = [
            self._send(each.peer, WorldJoined(each.call_id, current.unique_id, ranks)) for each in members
        ]
        _logger.info(
            log.WORLD_FORMED,
            world=world,
            ranks=current.num_ranks,
            untold=[rank for rank, is_told in enumerate(told) if not is_told],
        )


def _digest(unique_id: bytes) -> bytes:
    return hashlib.blake2b(unique_id, digest_size=16).digest()
