"""What changes, for who watches: a snapshot, then deltas, each under a number that a reader can come back
with.

Sans-I/O. One delta is made for all readers and kept for a minute, so that a page whose connection broke goes
on where it was; who comes later than that gets a snapshot. Nothing is made while nobody watches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from microserve.gateway.view.forms import EngineForm, HealthForm, RequestForm

KEPT_DELTAS = 120
MAX_ENDED = 200
"""Requests that one delta tells of; the others are counted."""
MAX_RUNNING = 200

_encoder = msgspec.json.Encoder()


class Look(msgspec.Struct, frozen=True):
    """The state at one moment, as deltas are made of."""

    at: float
    index_alive: bool
    control_version: int
    engines: Sequence[EngineForm]
    running: Sequence[RequestForm]
    num_running: int
    num_ended: int
    """Requests that have ended since the start."""
    health: HealthForm


class Snapshot(msgspec.Struct, frozen=True, tag="snapshot", tag_field="type"):
    """Everything that deltas change."""

    at: float
    index_alive: bool
    control_version: int
    engines: Sequence[EngineForm]
    running: Sequence[RequestForm]
    num_running: int
    ended: Sequence[RequestForm]
    """The last ones, the oldest first."""
    health: HealthForm


class Delta(msgspec.Struct, frozen=True, tag="delta", tag_field="type", omit_defaults=True):
    """What is not as it was; what is left out is."""

    at: float
    index_alive: bool
    control_version: int
    """Another one: strategies or labels have changed, and ``/view/strategies`` is to be asked again."""
    num_running: int
    engines: list[EngineForm] = []
    """New or changed, whole."""
    gone: list[str] = []
    running: Sequence[RequestForm] | None = None
    ended: list[RequestForm] = []
    """New ones, the oldest first."""
    num_skipped: int = 0
    """More that have ended, too many to tell."""
    health: HealthForm | None = None


class Feed:
    """Of one process; its numbers are no other's, so ``life`` stands before them."""

    def __init__(self, life: str) -> None:
        self._life = life
        self._number = 0
        self._last: Look | None = None
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=KEPT_DELTAS)

    @property
    def number(self) -> int:
        """Of the last delta."""
        return self._number

    @property
    def num_ended(self) -> int | None:
        """Requests that had ended at the last look; None before the first."""
        return None if self._last is None else self._last.num_ended

    def rest(self) -> None:
        """Nobody watches: what is kept would have gaps."""
        self._last = None
        self._kept.clear()

    def look(self, now: Look, ended: Sequence[RequestForm]) -> None:
        """Make the next delta; ``ended``: since the last look, the oldest first, as far as they are kept."""
        last, self._last = self._last, now
        self._number += 1
        if last is None:
            return
        known = {each.id: each for each in last.engines}
        there = {each.id for each in now.engines}
        num_new = now.num_ended - last.num_ended
        told = list(ended[-MAX_ENDED:])
        delta = Delta(
            at=now.at,
            index_alive=now.index_alive,
            control_version=now.control_version,
            num_running=now.num_running,
            engines=[each for each in now.engines if known.get(each.id) != each],
            gone=[each for each in known if each not in there],
            running=now.running if now.running or last.running else None,
            ended=told,
            num_skipped=num_new - len(told),
            health=now.health
            if msgspec.structs.replace(now.health, at=last.health.at) != last.health
            else None,
        )
        self._kept.append((self._number, self._event(self._number, delta)))

    def since(self, number: int) -> bytes:
        """All events behind that one; it is one of :meth:`number`'s."""
        return b"".join(event for each, event in self._kept if each > number)

    def resumed(self, last_event_id: str) -> int | None:
        """The number with which a reader comes back; None: it needs a snapshot."""
        life, _, digits = last_event_id.rpartition("-")
        if life != self._life or not digits.isascii() or not digits.isdigit() or len(digits) > 18:
            return None
        number = int(digits)
        oldest = self._kept[0][0] if self._kept else self._number + 1
        return number if oldest - 1 <= number <= self._number else None

    @property
    def base(self) -> tuple[int, Look]:
        """What a snapshot is made of, and deltas behind it go on from. Raises ``AssertionError`` before the
        first look."""
        assert self._last is not None
        return self._number, self._last

    def snapshot(self, ended: Sequence[RequestForm], base: tuple[int, Look]) -> bytes:
        """For who comes anew. ``base`` is taken before ``ended`` is asked for: what a delta behind it tells
        again, its reader knows by its id, and none is missed."""
        number, last = base
        snapshot = Snapshot(
            at=last.at,
            index_alive=last.index_alive,
            control_version=last.control_version,
            engines=last.engines,
            running=last.running,
            num_running=last.num_running,
            ended=ended,
            health=last.health,
        )
        return self._event(number, snapshot)

    def _event(self, number: int, message: Snapshot | Delta) -> bytes:
        return b"id: %s-%d\ndata: %s\n\n" % (self._life.encode(), number, _encoder.encode(message))
