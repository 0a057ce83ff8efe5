"""Who is alive, judged by progress and not by process life (WIRE.md 3.5; ZeroMQ Guide, chapter 4).

Sans-I/O: time comes in as ``now`` (monotonic seconds). Any message counts as a sign of life. A peer that
has work and whose progress counter stands still is as lost as one that is silent.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Loss(Enum):
    """Why a peer is no longer alive."""

    SILENT = "silent"
    STUCK = "stuck"


@dataclass(slots=True)
class _Peer:
    incarnation: int
    heard_at: float
    progress: int
    progressed_at: float
    busy: bool = False


class LivenessBook:
    """Peers by id, each with its incarnation, last sign of life and last progress."""

    def __init__(self, *, silence_s: float, stuck_s: float) -> None:
        """A peer is lost after ``silence_s`` without a message, or ``stuck_s`` of work without progress."""
        self._silence_s = silence_s
        self._stuck_s = stuck_s
        self._peers: dict[str, _Peer] = {}

    def __contains__(self, peer_id: str) -> bool:
        return peer_id in self._peers

    def __len__(self) -> int:
        return len(self._peers)

    def incarnation(self, peer_id: str) -> int | None:
        peer = self._peers.get(peer_id)
        return peer.incarnation if peer else None

    def joined(self, peer_id: str, incarnation: int, now: float) -> None:
        """The peer (or a new life of it) is here."""
        self._peers[peer_id] = _Peer(incarnation, now, 0, now)

    def heard(self, peer_id: str, incarnation: int, now: float) -> bool:
        """A message came. False if it is from an unknown peer or another life: discard it."""
        peer = self._peers.get(peer_id)
        if peer is None or peer.incarnation != incarnation:
            return False
        peer.heard_at = now
        return True

    def progressed(self, peer_id: str, *, progress: int, busy: bool, now: float) -> None:
        """Record a heartbeat's counter; an idle peer cannot be stuck."""
        peer = self._peers.get(peer_id)
        if peer is None:
            return
        if not busy or progress != peer.progress:
            peer.progressed_at = now
        peer.progress = progress
        peer.busy = busy

    def silent_in(self, peer_id: str, now: float) -> float:
        """Seconds until the peer is silent for too long if it stays so; 0 for one that is unknown."""
        peer = self._peers.get(peer_id)
        return max(0.0, peer.heard_at + self._silence_s - now) if peer else 0.0

    def left(self, peer_id: str) -> None:
        self._peers.pop(peer_id, None)

    def expire(self, now: float) -> list[tuple[str, Loss]]:
        """Remove and return the lost."""
        lost: list[tuple[str, Loss]] = []
        for peer_id, peer in self._peers.items():
            if now - peer.heard_at > self._silence_s:
                lost.append((peer_id, Loss.SILENT))
            elif peer.busy and now - peer.progressed_at > self._stuck_s:
                lost.append((peer_id, Loss.STUCK))
        for peer_id, _ in lost:
            del self._peers[peer_id]
        return lost
