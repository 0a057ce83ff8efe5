"""The model that test_grant_machine.py compares with, and writers whose writes arrive late."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.heap.heap import Copies, PeerHeap
from microserve.protocol.messages.kv.grant import Grant

NUM_BLOCKS = 10
NUM_SLOTS = 3
BLOCK_SIZE = 4
NUM_LAYERS = 2
LEASE_S = 10.0
RECEIVER = 1


@dataclass
class Write:
    effect: Callable[[], None]
    notes: list[Callable[[], None]] = field(default_factory=list)
    """What the model learns at the same moment."""


class LatePeer(PeerHeap):
    """Sees the peer at once, but its writes stay on the way until ``deliver``: a writer that is stopped
    for any time between any two of its writes."""

    def __init__(self, peer: PeerHeap) -> None:
        self._peer = peer
        self.layout, self.words, self.address = peer.layout, peer.words, peer.address
        self.on_the_way: deque[Write] = deque()

    def deliver(self, count: int) -> None:
        for _ in range(min(count, len(self.on_the_way))):
            write = self.on_the_way.popleft()
            write.effect()
            for note in write.notes:
                note()

    def put(self, copies: Copies, source_shift: int = 0, target_shift: int = 0) -> None:
        self.on_the_way.append(Write(lambda: self._peer.put(copies, source_shift, target_shift)))

    def signal(self, word: int, value: int) -> None:
        self.on_the_way.append(Write(lambda: self._peer.signal(word, value)))

    def signal_each(self, words: NDArray[np.int64], value: int) -> None:
        self.on_the_way.append(Write(lambda: self._peer.signal_each(words, value)))

    def let_go(self, slot: int, lane: int) -> None:
        self.on_the_way.append(Write(lambda: self._peer.let_go(slot, lane)))

    def read(self, word: int) -> int:
        return self._peer.read(word)

    def hold(self, slot: int, lane: int) -> bool:
        return self._peer.hold(slot, lane)

    def follow(self, stream: int) -> None:
        self._peer.follow(stream)

    def holds(self, slot: int, lane: int) -> bool:
        return self._peer.holds(slot, lane)

    def poll(self, *, wait: bool = False) -> None:
        self._peer.poll(wait=wait)

    @property
    def is_idle(self) -> bool:
        return self._peer.is_idle

    def owner_is_dead(self) -> bool:
        return self._peer.owner_is_dead()

    def close(self) -> None:
        self._peer.close()


@dataclass
class Lane:
    """The model of one writer, and the writer."""

    grant: ModelGrant
    writer: LaneWriter
    peer: LatePeer
    incarnation: int
    index: int
    begin: int
    end: int
    sent: list[int]
    """Per layer: tokens up to here are on the way or here."""
    here: list[int]
    is_over: bool = False
    is_visible: bool = False
    """Its claim has been delivered."""
    is_poisoned: bool = False
    holds: bool = True

    first_token: int | None = None

    def when_delivered(self, note: Callable[[], None], last: int = -1) -> None:
        """Note it in the model when the last write (or the one so far from the end) takes effect."""
        self.peer.on_the_way[last].notes.append(note)


@dataclass
class ModelGrant:
    grant: Grant
    seed: int
    expires_at: float
    matched_blocks: list[int]
    state: str = "open"
    """open, sealed, settled, quarantined, freed."""
    is_consumed: bool = False
    lanes: list[Lane] = field(default_factory=list)

    @property
    def is_live(self) -> bool:
        return self.state in ("open", "sealed")

    def frontier(self, layer: int) -> int:
        covered = {token for lane in self.lanes for token in range(lane.begin, lane.here[layer])}
        token = self.grant.matched
        while token in covered:
            token += 1
        return token

    @property
    def is_complete(self) -> bool:
        return all(self.frontier(layer) == self.grant.end for layer in range(NUM_LAYERS))

    @property
    def first_token(self) -> int | None:
        tokens = {lane.index: lane.first_token for lane in self.lanes if lane.first_token is not None}
        return tokens[min(tokens)] if tokens else None

    @property
    def is_hopeless(self) -> bool:
        return any(
            lane.is_poisoned or (not lane.holds and any(here < lane.end for here in lane.here))
            for lane in self.lanes
            if lane.is_visible
        )
