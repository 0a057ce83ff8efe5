"""How the KV events of an engine without snapshots become state that can be trusted: sans-I/O (WIRE.md 7.5).

Such an engine, a stock vLLM or SGLang, names no life and keeps its last batches for who asks for a replay. A
life is known by the last batch that was applied, the *anchor*: asked for that one again, the same life gives
the same bytes, and another one gives others, or none. Asked for now and then, it also shows that the engine
lives and whether its last batch was lost: it says nothing while it idles.

    SYNCING  nothing can be applied: batches are kept, a replay is on its way or about to be asked for
    LIVE     ``next_seq`` is the only batch that may be applied; a later one is a gap

What was heard before a replay was asked for is in its answer, if it is of this life: so it is forgotten then.
Who does not answer holds nothing that anybody knows of. An engine with no replay at all is *blind*: its
events are taken as they come, and what is known is forgotten whenever a number is not the next one.

Owns the order of one engine's batches; knows no sockets, no bytes and no index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

from microserve.services.links.feed_state import (
    BACKOFF_MAX_S,
    BACKOFF_MIN_S,
    MAX_BUFFERED_BATCHES,
    Apply,
    B,
    FeedCounters,
    Replace,
)

MAX_FAILURES = 2
"""Replays in a row that failed, after which what the engine held is forgotten."""


@dataclass(frozen=True, slots=True)
class MarkedBatch(Generic[B]):
    """One numbered message of a stream."""

    seq: int
    mark: bytes
    """Digest of its bytes."""
    events: B


@dataclass(frozen=True, slots=True)
class AskReplay:
    """Ask for every batch from ``start_seq`` on, after ``delay_s``; report the outcome with ``ticket``."""

    ticket: int
    start_seq: int
    delay_s: float


@dataclass(frozen=True, slots=True)
class _Asked:
    ticket: int
    anchor: tuple[int, bytes] | None
    """Sequence and mark of what the answer is to begin with; None: with whatever is kept."""


Step = AskReplay | Replace[B] | Apply[B]


class FollowState(Generic[B]):
    """One engine's stream. Every method returns what to do now, in order."""

    def __init__(self, nothing: B, *, is_blind: bool = False) -> None:
        """``nothing``: events of none. ``is_blind``: the engine replays nothing."""
        self.next_seq = 0
        self.live = is_blind
        self.counters = FeedCounters()
        self._nothing = nothing
        self._is_blind = is_blind
        self._anchor: tuple[int, bytes] | None = None
        self._buffer: dict[int, MarkedBatch[B]] = {}
        self._asked: _Asked | None = None
        self._tickets = 0
        self._asked_at: float | None = None
        self._backoff_s = 0.0
        self._failures = 0

    @property
    def num_buffered(self) -> int:
        return len(self._buffer)

    def start(self, now: float) -> list[Step[B]]:
        """Call once, after the subscription was made."""
        return self._ask(now)

    def poll(self, now: float) -> list[Step[B]]:
        """Call now and then: is it still the same life, and was nothing lost?"""
        return self._ask(now)

    def receive(self, batch: MarkedBatch[B], now: float) -> list[Step[B]]:
        """A live batch came."""
        self.counters.batches += 1
        if self._is_blind:
            return self._receive_blind(batch)
        if not self.live:
            self._keep(batch)
            return []
        if batch.seq == self.next_seq:
            return [self._apply(batch)]
        if (batch.seq, batch.mark) == self._anchor:
            self.counters.duplicates += 1
            return []
        self.counters.gaps += 1
        self._keep(batch)
        return self._resync(now)

    def lost(self, now: float) -> list[Step[B]]:
        """The connection ended: what comes next may be another life's."""
        return [] if self._is_blind else self._resync(now)

    def asking(self, ticket: int) -> None:
        """The question of ``ticket`` leaves now."""
        if self._asked is not None and self._asked.ticket == ticket:
            self._buffer.clear()

    def replayed(self, ticket: int, batches: Sequence[MarkedBatch[B]], now: float) -> list[Step[B]]:
        """The whole answer, in order."""
        asked = self._asked
        if asked is None or asked.ticket != ticket:
            return []
        self._asked = None
        self._failures = 0
        self.counters.snapshots += 1
        steps: list[Step[B]] = []
        if asked.anchor is None:
            self._anchor, self.next_seq = None, batches[0].seq if batches else 0
            steps.append(Replace(0, self._nothing))
        elif not batches or (batches[0].seq, batches[0].mark) != asked.anchor:
            return [*self._forget(), *self._resync(now)]  # another life, or it went on by more than it keeps
        for batch in batches:
            if batch.seq > self.next_seq:
                return [*self._forget(), *self._resync(now)]  # a hole where there can be none
            if batch.seq == self.next_seq:
                steps.append(self._apply(batch))
        for seq in sorted(self._buffer):
            if seq == self.next_seq:
                steps.append(self._apply(self._buffer.pop(seq)))
            elif seq < self.next_seq:
                del self._buffer[seq]
                self.counters.duplicates += 1
        if self._buffer:
            self.counters.gaps += 1
            return [*steps, *self._resync(now)]
        self.live = True
        return steps

    def replay_failed(self, ticket: int, now: float) -> list[Step[B]]:
        """No answer in time."""
        if self._asked is None or self._asked.ticket != ticket:
            return []
        self._asked = None
        self.counters.snapshot_failures += 1
        self._failures += 1
        forgotten = self._forget() if self._failures == MAX_FAILURES else []
        return [*forgotten, *self._resync(now)]

    def check_integrity(self) -> None:
        """Assert what must hold between any two events (tests call it after each)."""
        assert self.live or self._asked is not None, "a stream is live or a replay is on its way"
        assert not (self.live and self._buffer), "nothing waits in a live stream"
        assert len(self._buffer) <= MAX_BUFFERED_BATCHES
        assert self._anchor is None or self._anchor[0] == self.next_seq - 1

    def _receive_blind(self, batch: MarkedBatch[B]) -> list[Step[B]]:
        if batch.seq == self.next_seq:
            return [self._apply(batch)]
        if (batch.seq, batch.mark) == self._anchor:
            self.counters.duplicates += 1
            return []
        self.counters.gaps += self._anchor is not None
        return [*self._forget(), self._apply(batch)]

    def _apply(self, batch: MarkedBatch[B]) -> Apply[B]:
        self.next_seq = batch.seq + 1
        self._anchor = batch.seq, batch.mark
        self.counters.applied += 1
        return Apply(batch.events)

    def _keep(self, batch: MarkedBatch[B]) -> None:
        if len(self._buffer) >= MAX_BUFFERED_BATCHES:
            del self._buffer[next(iter(self._buffer))]
            self.counters.overflows += 1
        self._buffer[batch.seq] = batch

    def _forget(self) -> list[Step[B]]:
        self.counters.epochs += 1
        self._anchor, self.next_seq = None, 0
        return [Replace(0, self._nothing)]

    def _resync(self, now: float) -> list[Step[B]]:
        self.live = False
        return self._ask(now)

    def _ask(self, now: float) -> list[Step[B]]:
        """Never two at a time, and the less often the sooner they are needed again."""
        if self._asked is not None or self._is_blind:
            return []
        if self._asked_at is None or now - self._asked_at > BACKOFF_MAX_S:
            self._backoff_s = 0.0
        delay_s = self._backoff_s
        self._backoff_s = min(max(BACKOFF_MIN_S, 2 * delay_s), BACKOFF_MAX_S)
        self._asked_at = now + delay_s
        self._tickets += 1
        self._asked = _Asked(self._tickets, self._anchor)
        return [AskReplay(self._tickets, 0 if self._anchor is None else self._anchor[0], delay_s)]
