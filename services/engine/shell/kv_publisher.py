"""An engine's KV events, published and kept for those who missed some (WIRE.md 7).

Owns the sequence, the PUB socket, the replay ROUTER and the ring of past batches. Does not know what the
events mean. The sequence starts at 0 in every life of the engine, with a batch that clears what readers know
of the life before, and ``epoch`` names the life: a restart is never taken for a continuation.

A PUB socket drops at its high-water mark. Nothing is lost for good by it: the next batch shows the gap, and a
heartbeat is the last batch once more, under its number, for holding a block is a fact and no count. So a
heartbeat takes neither a number nor a place in the ring, however long an engine idles.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from microserve.protocol import log
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import ProtocolViolation
from microserve.protocol.messages.kv.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    KVEvent,
    KVEventBatch,
    encode_batch,
    parse_replay_request,
    publish_frames,
    replay_answer,
    replay_end,
)
from microserve.protocol.security.rights import Entrance

MAX_RING_BATCHES = 10_000
MAX_RING_NBYTES = 64 << 20
MAX_REPLAYS = 64
"""Peers answered at a time; a request beyond it is dropped and counted."""
REPLAY_INTERVAL_S = 1.0
"""Between the beginnings of two answers to one peer, and of more than ``MAX_REPLAYS`` to all: who asks sooner
waits. A reader that cannot read us asks for everything, again and again."""
REPLAY_BATCHES_PER_TURN = 256
"""Batches replayed before the loop gets its turn again."""
REPLAY_RETRY_S = 0.05
MAX_REPLAY_REFUSALS = 100
"""Retries without one batch taken (5 s) after which a peer that asked for a replay is given up."""

MAX_REPEATED_NBYTES = 4096
"""A heartbeat behind a longer batch is a short one that says nothing; from then on that one is repeated."""

_logger = structlog.get_logger()


@dataclass(slots=True)
class _Replay:
    """One peer's answer on its way."""

    next_seq: int
    begins_at: float
    """No sooner; or goes on, if the peer did not take it."""
    has_begun: bool = False
    refusals: int = 0


@dataclass(slots=True)
class PublisherCounters:
    """What happened so far; every number only grows."""

    batches: int = 0
    repeated: int = 0
    """Heartbeats that were the last batch once more."""
    unsent: int = 0
    """Batches, repeated ones too, that the PUB socket refused; their readers see a gap."""
    replays: int = 0
    replays_given_up: int = 0
    requests_rejected: int = 0


def topic_of(pattern: str, engine_id: str, model: str) -> str:
    """The topic that ``engine.events_topic`` means."""
    return pattern.replace("{id}", engine_id).replace("{model}", model)


class KvPublisher:
    """Publishes one engine's KV events. Everything runs in the loop that made it."""

    def __init__(
        self,
        bus: Bus,
        *,
        events_address: str,
        replay_address: str,
        topic: str,
        epoch: int,
        clock: Callable[[], float],
        open_to_all: bool = False,
        strict: bool = False,
        max_ring_nbytes: int = MAX_RING_NBYTES,
    ) -> None:
        """``epoch``: the engine's incarnation. ``clock``: wall-clock seconds, for people. ``open_to_all``:
        both sockets without keys, wherever they are bound. ``strict``: in vLLM's keys alone.

        Raises ``OSError`` when an address is taken and :class:`ConfigError` when it is exposed without keys.
        """
        self.next_seq = 0
        """The first batch that a snapshot taken now does not hold."""
        self.counters = PublisherCounters()
        self._topic = topic
        self._epoch = epoch
        self._strict = strict
        self._clock = clock
        self._max_ring_nbytes = max_ring_nbytes
        self._ring: deque[bytes] = deque()
        self._ring_nbytes = 0
        self._quiet = True
        self._replays: dict[bytes, _Replay] = {}
        self._began: dict[bytes, float] = {}
        """When the last answer to a peer began, if that was within ``REPLAY_INTERVAL_S``."""
        self._turn: asyncio.Handle | None = None
        self._loop = asyncio.get_running_loop()
        self._events = bus.publisher(events_address, Entrance.OPEN if open_to_all else Entrance.EVENTS)
        try:
            entrance = Entrance.OPEN if open_to_all else Entrance.REPLAY
            self._replay = bus.server(replay_address, self._on_request, entrance)
        except BaseException:
            self._events.close()
            raise
        self._send([AllBlocksCleared()])

    @property
    def address(self) -> str:
        return self._events.address

    @property
    def replay_address(self) -> str:
        return self._replay.address

    def publish(self, events: Sequence[KVEvent]) -> None:
        """Send one batch; without events it does nothing. Never blocks."""
        if events:
            self._send(events)
            self._quiet = False

    def beat(self) -> None:
        """Call every heartbeat interval: a stream that was quiet since then says its last word again."""
        if self._quiet:
            if not self._ring or len(self._ring[-1]) > MAX_REPEATED_NBYTES:
                self._send([BlockRemoved([])])
            else:
                self.counters.repeated += 1
                self._put_on_air(self.next_seq - 1, self._ring[-1])
        self._quiet = True

    def close(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
        self._events.close()
        self._replay.close()

    def _send(self, events: Sequence[KVEvent]) -> None:
        batch = KVEventBatch(self._clock(), list(events), None, self._epoch)
        payload = encode_batch(batch, strict=self._strict)
        self._ring.append(payload)
        self._ring_nbytes += len(payload)
        while len(self._ring) > MAX_RING_BATCHES or self._ring_nbytes > self._max_ring_nbytes:
            self._ring_nbytes -= len(self._ring.popleft())
        self.counters.batches += 1
        self._put_on_air(self.next_seq, payload)
        self.next_seq += 1

    def _put_on_air(self, seq: int, payload: bytes) -> None:
        if not self._events.send(publish_frames(self._topic, seq, payload)):
            self.counters.unsent += 1

    def _on_request(self, peer: bytes, frames: list[bytes]) -> None:
        try:
            _, start_seq = parse_replay_request([peer, *frames])
            if peer not in self._replays and len(self._replays) >= MAX_REPLAYS:
                raise ProtocolViolation(f"more than {MAX_REPLAYS} replays at a time")
        except ProtocolViolation as violation:
            self.counters.requests_rejected += 1
            _logger.warning(log.FRAME_REJECTED, socket="replay", error=violation.detail)
            return
        self.counters.replays += 1
        self._replays[peer] = _Replay(start_seq, self._may_begin_at(peer))
        self._schedule()

    def _may_begin_at(self, peer: bytes) -> float:
        now = self._loop.time()
        self._began = {peer: at for peer, at in self._began.items() if at > now - REPLAY_INTERVAL_S}
        if peer in self._began:
            return self._began[peer] + REPLAY_INTERVAL_S
        if len(self._began) >= MAX_REPLAYS:
            return min(self._began.values()) + REPLAY_INTERVAL_S
        return now

    def _pump(self) -> None:
        """Send a turn's worth to the peer that waits longest; what it does not take is sent later."""
        self._turn = None
        now = self._loop.time()
        peer = next((peer for peer, replay in self._replays.items() if replay.begins_at <= now), None)
        if peer is None:
            return self._schedule()
        replay = self._replays.pop(peer)
        if not replay.has_begun:
            replay.has_begun = True
            self._began[peer] = now
        taken = 0
        while taken < REPLAY_BATCHES_PER_TURN:
            oldest = self.next_seq - len(self._ring)
            seq = min(max(replay.next_seq, oldest), self.next_seq)
            if seq < self.next_seq:
                answer = replay_answer(peer, self._topic, seq, self._ring[seq - oldest])
            else:
                answer = replay_end(peer)
            if not self._replay.send(peer, answer[1:]):  # the ROUTER puts the identity in front itself
                break
            if seq == self.next_seq:
                return self._schedule()
            replay.next_seq = seq + 1
            taken += 1
        replay.refusals = 0 if taken else replay.refusals + 1
        if not taken:
            replay.begins_at = now + REPLAY_RETRY_S  # never a busy loop
        if replay.refusals <= MAX_REPLAY_REFUSALS:
            self._replays[peer] = replay
        else:
            self.counters.replays_given_up += 1
        self._schedule()

    def _schedule(self) -> None:
        """The next turn, when the first of the replays may go on."""
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        if self._replays:
            begins_at = min(replay.begins_at for replay in self._replays.values())
            self._turn = self._loop.call_at(max(begins_at, self._loop.time()), self._pump)
