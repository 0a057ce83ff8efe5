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

*Who says when he speaks next is not missed before.* A peer with which nothing is under way may say so
(``next_s``), and is lost after ``SIGNS`` times that. Whoever has something to do with it asks, and from then
on (:meth:`Peers.rouse`) it is lost after ``silence_s`` as any.

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

SIGNS = 3
"""Of life that are missed before who is idle is lost."""
MAX_NEXT_S = 10.0
"""Longer silence is granted to nobody."""


class Loss(Enum):
    """Why a peer is no longer alive."""

    SILENT = "silent"
    STUCK = "stuck"


class Listening:
    """The time in which this process could have heard somebody, in seconds from the first call on."""

    __slots__ = ("_due_s", "_interval_s", "_listened_s", "_looked_at")

    def __init__(self, interval_s: float) -> None:
        """``interval_s``: between two looks, when nothing is late."""
        self._interval_s = self._due_s = interval_s
        self._listened_s = 0.0
        self._looked_at: float | None = None

    def time(self, now: float) -> float:
        """As of ``now``; does not look."""
        if self._looked_at is None:
            self._looked_at = now
        since_s = now - self._looked_at
        if since_s <= 0.0:  # as max and min would say; they take twice as long, and this is asked often
            return self._listened_s
        return self._listened_s + (since_s if since_s < self._due_s else self._due_s)

    def look(self, now: float, next_s: float = 0.0) -> float:
        """The time at which to say who was silent. The loop must have turned since the last look. The next
        one comes in ``next_s``; 0: in an interval."""
        self._listened_s = self.time(now)
        self._looked_at = now
        self._due_s = next_s or self._interval_s
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
    next_s: float = 0.0
    """In which it has said that it speaks again; 0: every interval."""


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
        known._heard, known.next_s = heard, 0.0
        return known, replaced

    def heard(
        self, key: K, now: float, incarnation: int | None = None, next_s: float | None = None
    ) -> Peer[K, V] | None:
        """A message came. ``next_s``: in which it says that the next one comes, at most ``MAX_NEXT_S`` of
        that being believed; 0: every interval; None: it says nothing of that.

        None if it is a stranger's, or of another life (``incarnation``): discard it."""
        peer = self._peers.get(key)
        if peer is None or incarnation not in (None, peer.incarnation):
            return None
        peer._heard = self._listening.time(now)
        if next_s is not None:
            peer.next_s = min(next_s, MAX_NEXT_S) if next_s > 0.0 else 0.0
        return peer

    def rouse(self, key: K, now: float) -> None:
        """The peer is asked for a sign of life, and has ``silence_s`` to give one. Unknown ones and those
        that were due every interval are fine."""
        peer = self._peers.get(key)
        if peer is not None and peer.next_s:
            peer._heard, peer.next_s = self._listening.time(now), 0.0

    @property
    def are_idle(self) -> bool:
        """All of them, also where there is none."""
        return all(peer.next_s > 0.0 for peer in self._peers.values())

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
        return max(0.0, peer._heard + self._limit_s(peer) - self._listening.time(now)) if peer else 0.0

    def _limit_s(self, peer: Peer[K, V]) -> float:
        return max(self._silence_s, SIGNS * peer.next_s)

    def remove(self, key: K) -> Peer[K, V] | None:
        return self._peers.pop(key, None)

    def expire(self, now: float, next_s: float = 0.0) -> list[tuple[Peer[K, V], Loss]]:
        """Look: remove and return the lost. The next look comes in ``next_s``; 0: in an interval."""
        listened = self._listening.look(now, next_s)
        lost: list[tuple[Peer[K, V], Loss]] = []
        for peer in self._peers.values():
            if listened - peer._heard > self._limit_s(peer):
                lost.append((peer, Loss.SILENT))
            elif peer._is_busy and listened - peer._progressed > self._stuck_s:
                lost.append((peer, Loss.STUCK))
        for peer, _ in lost:
            del self._peers[peer.key]
        return lost
