"""Heaps of other engines that this one writes into: opened at the first send, left when the owner is gone.

For the step thread. Owns the open :class:`PeerHeap`s; knows neither requests nor blocks.
"""

from __future__ import annotations

import contextlib

from microserve.kvcache.heap.heap import Heap, PeerHeap
from microserve.protocol.errors import TransferFailed
from microserve.protocol.messages.grant import Grant
from microserve.services.engine.core.state import Clock

DEAD_LOOK_S = 1.0
"""Pause between looks for dead owners: an open heap of theirs pins all of its memory."""


class Peers:
    def __init__(self, heap: Heap, clock: Clock) -> None:
        self._heap = heap
        self._clock = clock
        self._open: dict[int, PeerHeap] = {}
        """By incarnation."""
        self._looked_at = clock()

    def open(self, grant: Grant) -> PeerHeap:
        """By the first of the grant's addresses that reaches. :class:`TransferFailed` if the owner is gone,
        out of reach of our heap, or has other KV."""
        peer = self._open.get(grant.heap.incarnation)
        if peer is not None and peer.is_lost:
            self._open.pop(grant.heap.incarnation).close()
            peer = None
        if peer is None:
            self._leave_dead()
            peer = self._open[grant.heap.incarnation] = self._heap.reach(grant.heap, grant.doors)
        elif peer.owner_is_dead():
            # What its open heap takes is read by nobody: no send may be told that it is done. One that was
            # begun before holds a lane there, and the heap open.
            self._leave_dead()
            raise TransferFailed(f"the owner {grant.heap.incarnation:#x} is gone")
        return peer

    @property
    def look_s(self) -> float | None:
        """Longest pause between two calls of ``poll`` while nothing is put anywhere; None: for ever."""
        return DEAD_LOOK_S if self._open else None

    def poll(self) -> None:
        """Free the lanes whose puts are done; once a step, and on idle ticks. Never waits for a put."""
        for peer in self._open.values():
            if peer.is_late:
                peer.poll()
        if self._clock() - self._looked_at >= DEAD_LOOK_S:
            self._leave_dead()

    def _leave_dead(self) -> None:
        self._looked_at = self._clock()
        gone = [
            i for i, peer in self._open.items() if peer.is_lost or (peer.is_idle and peer.owner_is_dead())
        ]
        for incarnation in gone:
            with contextlib.suppress(OSError):
                self._open.pop(incarnation).close()

    def close(self) -> None:
        """Leave all of them, once what was put is there. No lane may be held that was not let go."""
        while self._open:
            self._open.popitem()[1].close()
