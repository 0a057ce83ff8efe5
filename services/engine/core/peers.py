"""Heaps of other engines that this one writes into: opened at the first send, left when the owner is gone.

For the step thread, but :meth:`Peers.open`, which others may call that wait for a network in its stead
(claims.py). Owns the open :class:`PeerHeap`s, and what is known of the networks behind them; knows neither
requests nor blocks.
"""

from __future__ import annotations

import contextlib
import threading

from microserve.kvcache.codec.choice.links import MAX_LINKS, LinkMonitor
from microserve.kvcache.heap.heap import Heap, PeerHeap
from microserve.protocol.errors import TransferFailed
from microserve.protocol.messages.kv.grant import Grant
from microserve.services.engine.core.state import Clock

DEAD_LOOK_S = 1.0
"""Pause between looks for dead owners: an open heap of theirs pins all of its memory."""


class Peers:
    def __init__(self, heap: Heap, clock: Clock) -> None:
        self._heap = heap
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[int, PeerHeap] = {}
        """By incarnation. Under the lock."""
        self._looked_at = clock()
        self._names: dict[int, str] = {}
        """Engines that own them. Under the lock."""
        self._links = LinkMonitor()
        """By incarnation, for the next life may stand elsewhere; outlives a connection that broke."""

    def may_be_far(self, grant: Grant) -> bool:
        """Who opens it, or takes a lane there, may wait for a network."""
        peer = self._find(grant.heap.incarnation)
        if peer is not None and not peer.is_lost:
            return peer.is_far
        return self._heap.may_be_far(grant.heap, grant.doors)

    def open(self, grant: Grant) -> PeerHeap:
        """By the first of the grant's addresses that reaches. :class:`TransferFailed` if the owner is gone,
        out of reach of our heap, or has other KV."""
        incarnation = grant.heap.incarnation
        peer = self._find(incarnation)
        if peer is not None and peer.is_lost:
            self._leave(incarnation)
            peer = None
        if peer is None:
            self._leave_dead()
            reached = self._heap.reach(grant.heap, grant.doors)
            with self._lock:
                peer = self._open.setdefault(incarnation, reached)
                self._names[incarnation] = grant.engine_id
            if peer is not reached:
                reached.close()
        elif peer.owner_is_dead():
            # What its open heap takes is read by nobody: no send may be told that it is done. One that was
            # begun before holds a lane there, and the heap open.
            self._leave_dead()
            raise TransferFailed(f"the owner {grant.heap.incarnation:#x} is gone")
        return peer

    def nbytes_per_s(self, grant: Grant) -> float:
        """Of the network to its owner; 0: there is none between, or nothing is known. Not beside ``poll``."""
        self._measure()
        return self._links.goodput(_link(grant.heap.incarnation))

    def goodputs(self, limit: int) -> dict[str, float]:
        """Bytes a second by engine, of the ``limit`` networks that were measured last; likewise."""
        with self._lock:
            names = {_link(incarnation): name for incarnation, name in self._names.items()}
        known = self._links.goodputs(MAX_LINKS)
        told = [(names[link], goodput) for link, goodput in known.items() if link in names]
        return dict(told[:limit])

    @property
    def look_s(self) -> float | None:
        """Longest pause between two calls of ``poll`` while nothing is put anywhere; None: for ever."""
        return DEAD_LOOK_S if self._open else None

    def poll(self) -> None:
        """Free the lanes whose puts are done; once a step, and on idle ticks. Never waits for a put."""
        with self._lock:
            late = [peer for peer in self._open.values() if peer.is_late]
        for peer in late:
            peer.poll()
        self._measure()
        if self._clock() - self._looked_at >= DEAD_LOOK_S:
            self._leave_dead()

    def _measure(self) -> None:
        with self._lock:
            peers = list(self._open.items())
        for incarnation, peer in peers:
            for nbytes, seconds in peer.take_samples():
                self._links.sent(_link(incarnation), nbytes, seconds)

    def _leave_dead(self) -> None:
        self._looked_at = self._clock()
        with self._lock:
            peers = list(self._open.items())
        for incarnation, peer in peers:
            if peer.is_lost or (peer.is_idle and peer.owner_is_dead()):
                self._leave(incarnation)

    def _find(self, incarnation: int) -> PeerHeap | None:
        with self._lock:
            return self._open.get(incarnation)

    def _leave(self, incarnation: int) -> None:
        with self._lock:
            peer = self._open.pop(incarnation, None)
            self._names.pop(incarnation, None)
        if peer is not None:
            with contextlib.suppress(OSError):
                peer.close()

    def close(self) -> None:
        """Leave all of them, once what was put is there. No lane may be held that was not let go."""
        while self._open:
            self._open.popitem()[1].close()


def _link(incarnation: int) -> str:
    return f"{incarnation:x}"
