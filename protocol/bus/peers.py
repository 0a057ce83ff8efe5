"""Who is at the other end, and who is alive: one table, one rule for silence (WIRE.md 3.5).

A peer is known by its key (where it is reached), its name and its incarnation. It is lost after ``silence_s``
without a message, or after ``stuck_s`` of work without progress: judged by progress and not by process life
(ZeroMQ Guide, chapter 4).

*Who did not listen cannot say that the other was silent.* What a peer sent while this process stood still
lies unread in a socket. So silence is measured by :class:`Listening` and not by the clock: between two looks
at the table at most one interval counts, however long it was. A living peer is heard before the next look and
is never lost by a stall of ours; a silent one is lost after as many looks as its silence has intervals, and
one, also by a process that is always late. (To forgive everything after a late look, as one might, loses
nobody in such a process, and says by a threshold which look is late: right for one length of silence, wrong
for another.)

Sans-I/O: time comes in as ``now`` (monotonic seconds). What a peer is for is its ``value``, unknown here.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Loss(Enum):
    """Why a peer is no longer alive."""

    SILENT = "silent"
    STUCK = "stuck"


class Listening:
    """The time in which this process could have heard somebody, in seconds from the first call on."""

    __slots__ = ("_interval_s", "_listened_s", "_looked_at")

    def __init__(self, interval_s: float) -> None:
        """``interval_s``: between two looks, when nothing is late."""
        self._interval_s = interval_s
        self._listened_s = 0.0
        self._looked_at: float | None = None

    def time(self, now: float) -> float:
        """As of ``now``; does not look."""
        if self._looked_at is None:
            self._looked_at = now
        since_s = now - self._looked_at
        if since_s <= 0.0:  # as max and min would say; they take twice as long, and this is asked often
            return self._listened_s
        return self._listened_s + (since_s if since_s < self._interval_s else self._interval_s)

    def look(self, now: float) -> float:
        """The time at which to say who was silent. The loop must have turned since the last look."""
        self._listened_s = self.time(now)
        self._looked_at = now
        return self._listened_s


@dataclass(slots=True, eq=False)
class Peer(Generic[K, V]):
    """One life of a peer at one place."""

    key: K
    name: Hashable
    incarnation: int
    value: V
    _heard: float
    """As all times here: by :class:`Listening`."""
    _progressed: float
    _progress: int = 0
    _is_busy: bool = False


class Peers(Generic[K, V]):
    """Peers by key. Call :meth:`expire` every interval."""

    def __init__(self, *, interval_s: float, silence_s: float, stuck_s: float = math.inf) -> None:
        """A peer is lost after ``silence_s`` without a message, or ``stuck_s`` of work without progress."""
        self._silence_s = silence_s
        self._stuck_s = stuck_s
        self._listening = Listening(interval_s)
        self._peers: dict[K, Peer[K, V]] = {}

    def __len__(self) -> int:
        return len(self._peers)

    def __contains__(self, key: K) -> bool:
        return key in self._peers

    def __iter__(self) -> Iterator[Peer[K, V]]:
        """In the order of their coming; peers may be removed meanwhile."""
        return iter(list(self._peers.values()))

    def find(self, key: K) -> Peer[K, V] | None:
        return self._peers.get(key)

    def join(
        self, key: K, name: Hashable, incarnation: int, value: V, now: float
    ) -> tuple[Peer[K, V], list[Peer[K, V]]]:
        """A peer said hello. Also returns those that it replaces: they are out, its older lives and
        connections. One that is known stays as it is, with the value that it has."""
        known = self._peers.get(key)
        if known is not None and known.incarnation != incarnation:
            known = None
        replaced = [p for p in self._peers.values() if p is not known and (p.name == name or p.key == key)]
        for peer in replaced:
            del self._peers[peer.key]
        heard = self._listening.time(now)
        if known is None:
            known = self._peers[key] = Peer(key, name, incarnation, value, heard, heard)
        known._heard = heard
        return known, replaced

    def heard(self, key: K, now: float, incarnation: int | None = None) -> Peer[K, V] | None:
        """A message came. None if it is a stranger's, or of another life (``incarnation``): discard it."""
        peer = self._peers.get(key)
        if peer is None or incarnation not in (None, peer.incarnation):
            return None
        peer._heard = self._listening.time(now)
        return peer

    def progressed(self, key: K, *, progress: int, busy: bool, now: float) -> None:
        """Record a heartbeat's counter; an idle peer cannot be stuck."""
        peer = self._peers.get(key)
        if peer is None:
            return
        if not busy or progress != peer._progress:
            peer._progressed = self._listening.time(now)
        peer._progress = progress
        peer._is_busy = busy

    def silent_in(self, key: K, now: float) -> float:
        """Seconds until the peer is silent for too long if it stays so; 0 for one that is unknown."""
        peer = self._peers.get(key)
        return max(0.0, peer._heard + self._silence_s - self._listening.time(now)) if peer else 0.0

    def remove(self, key: K) -> Peer[K, V] | None:
        return self._peers.pop(key, None)

    def expire(self, now: float) -> list[tuple[Peer[K, V], Loss]]:
        """Look: remove and return the lost."""
        listened = self._listening.look(now)
        lost: list[tuple[Peer[K, V], Loss]] = []
        for peer in self._peers.values():
            if listened - peer._heard > self._silence_s:
                lost.append((peer, Loss.SILENT))
            elif peer._is_busy and listened - peer._progressed > self._stuck_s:
                lost.append((peer, Loss.STUCK))
        for peer, _ in lost:
            del self._peers[peer.key]
        return lost
