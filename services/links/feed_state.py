"""How one engine's KV events become state that can be trusted: sans-I/O (WIRE.md 7.3).

Snapshot + epoch + sequence, as in the Clone pattern (ZeroMQ Guide, chapter 5). Owns the order of one
engine's batches; knows no sockets, no bytes and no index: batches come in as opaque values, instructions
go out.

    SYNCING  nothing can be applied: batches are kept, a snapshot is on its way or about to be asked for
    LIVE     ``next_seq`` is the only batch that may be applied; a later one is a gap

Epochs are random numbers without order. What orders them: an engine id has one life at a time, so an epoch
heard *before* a snapshot was asked for and different from the snapshot's is over. It is then retired, and
its stragglers are dropped. One heard *after* may be the next life: another snapshot decides.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

MAX_BUFFERED_BATCHES = 4096
"""Batches kept while a snapshot is on its way; beyond it the oldest go, and a gap brings a new snapshot."""
MAX_RETIRED_EPOCHS = 64
BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 2.0

B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class EventBatch(Generic[B]):
    """One numbered message of an engine's event stream."""

    epoch: int
    seq: int
    events: B


@dataclass(frozen=True, slots=True)
class AskSnapshot:
    """Ask the engine for a snapshot after ``delay_s`` and report the outcome with ``ticket``."""

    ticket: int
    delay_s: float


@dataclass(frozen=True, slots=True)
class Replace(Generic[B]):
    """Forget what is known of the engine and apply the snapshot, in one step."""

    epoch: int
    events: B


@dataclass(frozen=True, slots=True)
class Apply(Generic[B]):
    """Apply one batch on top."""

    events: B


Instruction = AskSnapshot | Replace[B] | Apply[B]


@dataclass(slots=True)
class FeedCounters:
    """What happened so far; every number only grows."""

    batches: int = 0
    applied: int = 0
    duplicates: int = 0
    stale: int = 0
    """Batches of an epoch that is over."""
    gaps: int = 0
    epochs: int = 0
    """Times that a snapshot came from another life of the engine."""
    overflows: int = 0
    """Batches thrown away while a snapshot was on its way."""
    snapshots: int = 0
    snapshot_failures: int = 0


@dataclass(slots=True)
class _Asked:
    """The snapshot on its way."""

    ticket: int
    heard: set[int] = field(default_factory=set)
    """Epochs, not retired, that had been heard when it was asked for."""


class FeedState(Generic[B]):
    """One engine's stream. Every method returns what to do now, in order."""

    def __init__(self) -> None:
        self.epoch: int | None = None
        """None until the first snapshot."""
        self.next_seq = 0
        self.live = False
        self.counters = FeedCounters()
        self._buffer: dict[tuple[int, int], EventBatch[B]] = {}
        self._heard: set[int] = set()
        self._retired: deque[int] = deque(maxlen=MAX_RETIRED_EPOCHS)
        self._asked: _Asked | None = None
        self._tickets = 0
        self._asked_at: float | None = None
        self._backoff_s = 0.0

    @property
    def num_buffered(self) -> int:
        return len(self._buffer)

    def start(self, now: float) -> list[Instruction[B]]:
        """Call once, after the subscription was made: whatever it misses, the snapshot holds."""
        return self._resync(now)

    def receive(self, batch: EventBatch[B], now: float) -> list[Instruction[B]]:
        """A live batch came."""
        self.counters.batches += 1
        if batch.epoch in self._retired:
            self.counters.stale += 1
            return []
        if not self.live:
            self._keep(batch)
            return []
        if batch.epoch != self.epoch:
            self._keep(batch)
            return self._resync(now)
        if batch.seq < self.next_seq:
            self.counters.duplicates += 1
            return []
        if batch.seq > self.next_seq:
            self.counters.gaps += 1
            self._keep(batch)
            return self._resync(now)
        return [self._apply(batch)]

    def snapshot(self, ticket: int, snapshot: EventBatch[B], now: float) -> list[Instruction[B]]:
        """The snapshot came; its ``seq`` is the first live batch that it does not hold."""
        asked = self._asked
        if asked is None or asked.ticket != ticket:
            return []
        self._asked = None
        self.counters.snapshots += 1
        self.counters.epochs += self.epoch not in (None, snapshot.epoch)
        if snapshot.epoch in self._retired:
            self._retired.remove(snapshot.epoch)  # who answers is alive, whatever was concluded before
        for epoch in asked.heard - {snapshot.epoch}:
            self._retire(epoch)
        self.epoch, self.next_seq, self.live = snapshot.epoch, snapshot.seq, True
        instructions: list[Instruction[B]] = [Replace(snapshot.epoch, snapshot.events)]
        for key in sorted(key for key in self._buffer if key[0] == snapshot.epoch):
            if key[1] > self.next_seq:
                self.counters.gaps += 1
                break
            batch = self._buffer.pop(key)
            if key[1] < self.next_seq:
                self.counters.duplicates += 1
            else:
                instructions.append(self._apply(batch))
        self._heard = {epoch for epoch, _ in self._buffer} | {snapshot.epoch}
        # What is left lies behind a gap or is of an epoch first heard after the question was asked.
        return [*instructions, *self._resync(now)] if self._buffer else instructions

    def snapshot_failed(self, ticket: int, now: float) -> list[Instruction[B]]:
        """No answer, or one that could not be read."""
        if self._asked is None or self._asked.ticket != ticket:
            return []
        self._asked = None
        self.counters.snapshot_failures += 1
        return self._resync(now)

    def asking(self, ticket: int) -> None:
        """The question of ``ticket`` leaves now: epochs heard until here are ordered before its answer."""
        if self._asked is not None and self._asked.ticket == ticket:
            self._asked.heard = set(self._heard)

    def doubt(self, now: float) -> list[Instruction[B]]:
        """The stream may be another life's, which does not say so."""
        return self._resync(now)

    def check_integrity(self) -> None:
        """Assert what must hold between any two events (tests call it after each)."""
        assert self.live == (self._asked is None), "a stream is live or a snapshot is on its way"
        assert not (self.live and self._buffer), "nothing waits in a live stream"
        assert len(self._buffer) <= MAX_BUFFERED_BATCHES
        assert not any(epoch in self._retired for epoch, _ in self._buffer)
        assert self.epoch not in self._retired

    def _apply(self, batch: EventBatch[B]) -> Apply[B]:
        self.next_seq = batch.seq + 1
        self.counters.applied += 1
        return Apply(batch.events)

    def _keep(self, batch: EventBatch[B]) -> None:
        key = (batch.epoch, batch.seq)
        if key in self._buffer:
            self.counters.duplicates += 1
            return
        self._heard.add(batch.epoch)
        if len(self._buffer) >= MAX_BUFFERED_BATCHES:
            del self._buffer[next(iter(self._buffer))]
            self.counters.overflows += 1
        self._buffer[key] = batch

    def _retire(self, epoch: int) -> None:
        self._retired.append(epoch)
        self._heard.discard(epoch)
        for key in [key for key in self._buffer if key[0] == epoch]:
            del self._buffer[key]
            self.counters.stale += 1

    def _resync(self, now: float) -> list[Instruction[B]]:
        """Ask for a snapshot, never two at a time, and the less often the sooner they are needed again."""
        self.live = False
        if self._asked is not None:
            return []
        if self._asked_at is None or now - self._asked_at > BACKOFF_MAX_S:
            self._backoff_s = 0.0
        delay_s = self._backoff_s
        self._backoff_s = min(max(BACKOFF_MIN_S, 2 * delay_s), BACKOFF_MAX_S)
        self._asked_at = now + delay_s
        self._tickets += 1
        self._asked = _Asked(self._tickets)
        return [AskSnapshot(self._tickets, delay_s)]
