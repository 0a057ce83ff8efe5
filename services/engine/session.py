"""Routers that talk to this engine: who they are, what they may still be sent (WIRE.md 4).

Sans-I/O. A router owns its requests and has one connection here: when it falls silent, or returns with a new
incarnation or by a new connection, everything of the old one is dropped. Deltas that lack credit wait
here, merged per request, so a slow router costs memory bounded by its requests' own ``max_tokens``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from microserve.protocol.bus.credit import CreditWindow
from microserve.protocol.messages.engine import Delta, Deltas

MAX_MESSAGE_TOKENS = 16_384
"""In one message: with 20 log-probabilities each they stay below ``codec.MAX_MESSAGE_NBYTES``."""


def _cut(delta: Delta, count: int) -> tuple[Delta, Delta]:
    """The first ``count`` tokens, and the rest with the end."""
    head = Delta(delta.request_id, delta.offset, delta.token_ids[:count], delta.logprobs[:count])
    rest = delta.offset + count
    tail = Delta(delta.request_id, rest, delta.token_ids[count:], delta.logprobs[count:], delta.finished)
    return head, tail


@dataclass(slots=True)
class Session:
    peer: bytes
    router_id: str
    incarnation: int
    window: CreditWindow
    heard_at: float
    pending: dict[str, Delta] = field(default_factory=dict)
    """By request id, in order of their first token."""

    def add(self, delta: Delta) -> None:
        """Queue new tokens, merged with what already waits for the same request."""
        waiting = self.pending.get(delta.request_id)
        if waiting is None or waiting.finished is not None:
            self.pending[delta.request_id] = delta
            return
        # The lists are this session's alone: extending them keeps a long wait linear.
        waiting.token_ids.extend(delta.token_ids)
        waiting.logprobs.extend(delta.logprobs)
        self.pending[delta.request_id] = Delta(
            delta.request_id, waiting.offset, waiting.token_ids, waiting.logprobs, delta.finished
        )

    def take(self) -> Deltas | None:
        """One message with as much as fits of what waits, or None without tokens or credit."""
        if not self.pending or not self.window.take():
            return None
        deltas: list[Delta] = []
        room = MAX_MESSAGE_TOKENS
        for request_id, delta in list(self.pending.items()):
            if room <= 0:
                break
            if len(delta.token_ids) > room:
                head, tail = _cut(delta, room)
                deltas.append(head)
                self.pending[request_id] = tail
                break
            deltas.append(delta)
            del self.pending[request_id]
            room -= len(delta.token_ids)
        return Deltas(deltas)


class Sessions:
    """Sessions by routing id."""

    def __init__(self, *, silence_s: float) -> None:
        self._silence_s = silence_s
        self._sessions: dict[bytes, Session] = {}
        self._expired_at = float("-inf")

    def __len__(self) -> int:
        return len(self._sessions)

    def all(self) -> list[Session]:
        return list(self._sessions.values())

    def find(self, peer: bytes) -> Session | None:
        return self._sessions.get(peer)

    def open(
        self, peer: bytes, router_id: str, incarnation: int, credit: int, now: float
    ) -> tuple[Session, list[Session]]:
        """A router said hello. Also returns the sessions that it replaces: older lives and connections."""
        replaced = [
            s
            for s in self._sessions.values()
            if s.router_id == router_id and (s.peer != peer or s.incarnation != incarnation)
        ]
        known = self._sessions.get(peer)
        if known is not None and known.incarnation != incarnation and known not in replaced:
            replaced.append(known)
        for session in replaced:
            del self._sessions[session.peer]
        if known is not None and known not in replaced:
            known.heard_at = now
            known.window = CreditWindow(credit)
            return known, replaced
        session = Session(peer, router_id, incarnation, CreditWindow(credit), now)
        self._sessions[peer] = session
        return session, replaced

    def remove(self, peer: bytes) -> Session | None:
        return self._sessions.pop(peer, None)

    def expire(self, now: float) -> list[Session]:
        """Remove and return the silent. To be called several times in the silence that is allowed: after a
        pause longer than half of it nobody counts as silent, for who did not listen cannot say so."""
        stalled, self._expired_at = now - self._expired_at > self._silence_s / 2, now
        if stalled:
            for session in self._sessions.values():
                session.heard_at = now
        silent = [s for s in self._sessions.values() if now - s.heard_at > self._silence_s]
        for session in silent:
            del self._sessions[session.peer]
        return silent
