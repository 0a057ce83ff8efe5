"""Lanes that sends take, and the waiting for those that are behind a network.

A lane of this host is taken by the step that sends (:meth:`Claims.take`): that costs microseconds. Behind a
door both the first connection and each lane take an answer, which comes late from far away and never from an
owner that is frozen or cut off. So the lane is taken before the send takes its turn, in a thread, one for
each owner that is waited for (:meth:`Claims.begin`); steps go on meanwhile, and so do sends to other owners.

Owns those threads. Knows sends (request/sequence.py), not the engine's lock: what is known of a claim is
under a lock of its own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import structlog

from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.heap.heap import Heap, PeerHeap
from microserve.protocol import log
from microserve.protocol.errors import InternalError, MeshError, TransferFailed
from microserve.services.engine.core.peers import Peers
from microserve.services.engine.core.request.sequence import Transfer

_logger = structlog.get_logger()


class Claim:
    """One lane that is being taken. ``take_into`` and ``cancel`` are of whoever waits for it."""

    def __init__(self, on_done: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._on_done = on_done
        self._is_cancelled = False
        self._peer: PeerHeap | None = None
        self._writer: LaneWriter | None = None
        self._error: MeshError | None = None
        self.is_done = False

    @property
    def is_cancelled(self) -> bool:
        return self._is_cancelled

    def settle(
        self,
        peer: PeerHeap | None = None,
        writer: LaneWriter | None = None,
        error: MeshError | None = None,
    ) -> None:
        """By the thread that took it, or could not; without ``writer`` the step takes it of a near peer."""
        with self._lock:
            self._peer, self._writer, self._error = peer, writer, error
            self.is_done = True
            if self._is_cancelled and writer is not None:
                writer.fail()
        self._on_done()

    def take_into(self, transfer: Transfer) -> None:
        """Once it is done. Raises why it could not be taken."""
        if self._error is not None:
            raise self._error
        if self._writer is not None:
            transfer.peer, transfer.writer = self._peer, self._writer

    def cancel(self) -> None:
        """Nobody wants it: it is let go, now or when it is there."""
        with self._lock:
            self._is_cancelled = True
            if self._writer is not None:
                self._writer.fail()


class Claims:
    def __init__(self, heap: Heap, peers: Peers, *, checksums: bool) -> None:
        self._heap = heap
        self._peers = peers
        self._checksums = checksums
        self._lock = threading.Lock()
        self._asked: dict[int, deque[tuple[Transfer, Claim]]] = {}
        """By incarnation of the owner, those behind which a thread is; the first is what it does."""
        self._threads: list[threading.Thread] = []

    def take(self, transfer: Transfer) -> None:
        """In this thread; waits as long as the way is. :class:`MeshError`, ``OSError`` or ``MemoryError`` if
        it cannot be had."""
        peer = transfer.peer = self._peers.open(transfer.grant)
        transfer.writer = self._claimed(transfer, peer)

    def begin(self, transfer: Transfer, on_done: Callable[[], None]) -> Claim | None:
        """None: it is near, and who sends may :meth:`take` it. ``on_done`` is called in another thread."""
        if not self._peers.may_be_far(transfer.grant):
            return None
        claim, owner = Claim(on_done), transfer.grant.heap.incarnation
        with self._lock:
            if owner in self._asked:
                self._asked[owner].append((transfer, claim))
                return claim
            self._asked[owner] = deque([(transfer, claim)])
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            thread = threading.Thread(target=self._run, args=(owner,), name="claim", daemon=True)
            self._threads.append(thread)
        thread.start()
        return claim

    def close(self) -> None:
        """When this returns no lane is taken any more. All of them are cancelled before."""
        with self._lock:
            threads = self._threads
        for thread in threads:
            thread.join()

    def _run(self, owner: int) -> None:
        """Take what is asked of one owner, in order, until nothing is."""
        asked = self._asked[owner]
        while True:
            transfer, claim = asked[0]
            self._settle(transfer, claim)
            with self._lock:
                asked.popleft()
                if not asked:
                    del self._asked[owner]
                    return

    def _settle(self, transfer: Transfer, claim: Claim) -> None:
        if claim.is_cancelled:
            claim.settle()
            return
        try:
            peer = self._peers.open(transfer.grant)
            writer = self._claimed(transfer, peer) if peer.is_far else None
        except MeshError as error:
            claim.settle(error=error)
        except (OSError, MemoryError) as error:
            claim.settle(error=unsendable(error))
        except Exception as error:
            _logger.exception(log.CLAIM_FAILED, grant_id=transfer.grant.grant_id)
            claim.settle(error=InternalError(f"the lane cannot be taken: {error!r}"))
        else:
            claim.settle(peer, writer)

    def _claimed(self, transfer: Transfer, peer: PeerHeap) -> LaneWriter:
        grant, lane = transfer.grant, transfer.lane
        if peer.holds(grant.slot, lane):
            # Ours: a claim under the slot's last grant came too late, and leaves behind other puts.
            peer.poll(wait=True)
        bounds = grant, lane, transfer.begin, transfer.end
        is_encoded = transfer.outgoing is not None and transfer.outgoing.is_encoded
        writer = LaneWriter(self._heap, peer, *bounds, checksums=self._checksums, encoded=is_encoded)
        writer.claim()
        return writer


def unsendable(error: OSError | MemoryError) -> TransferFailed:
    """No descriptor, no memory for a peer's heap: the end of one send."""
    return TransferFailed(f"it cannot be sent: {error or type(error).__name__}")
