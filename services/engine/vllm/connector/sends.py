"""Sends on the scheduler's side: which tokens of whose send a step computes, and when a send has ended.

vLLM chooses the chunks. In a request's first step its part begins at 0, so what it found in vLLM's prefix
cache goes out by the same hooks as what it computes. A preempted request computes again what has been sent;
only what was not is a part again.

Owns that arithmetic. Knows neither grants nor heaps (putting.py), nor vLLM's objects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from microserve.services.engine.vllm.link import Notice, Send, SendFailed


@dataclass(frozen=True, slots=True)
class Part:
    """KV of tokens ``[lo, hi)`` is whole, layer by layer, as this step computes it."""

    send: Send
    lo: int
    hi: int
    blocks: list[int]
    """Of tokens ``[0, hi)`` and maybe more."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A send's request has ended, or is aborted; vLLM keeps its blocks until the worker says so."""

    id: int
    request_id: str
    first_token: int | None


@dataclass(slots=True)
class _Entry:
    send: Send
    num_preemptions: int = 0
    hi: int = 0
    """What parts have been made of."""


class Sends:
    def __init__(self, tell: Callable[[Notice], None]) -> None:
        self._tell = tell
        self._entries: dict[str, _Entry] = {}
        self._ended: list[Ended] = []

    def add(self, request_id: str, send: Send) -> None:
        self._entries[request_id] = _Entry(send)

    def part(self, request_id: str, num_computed: int, num_scheduled: int, blocks: list[int]) -> Part | None:
        """A step computes ``[num_computed, num_computed + num_scheduled)`` of that request."""
        entry = self._entries[request_id]
        lo, hi = entry.hi, min(num_computed + num_scheduled, entry.send.end)
        if hi <= lo:
            return None
        entry.hi = hi
        return Part(entry.send, lo, hi, blocks)

    def is_preempted(self, request_id: str, num_preemptions: int) -> bool:
        """Since this was last asked: its blocks may be another request's in this step."""
        entry = self._entries[request_id]
        since, entry.num_preemptions = entry.num_preemptions, num_preemptions
        return num_preemptions > since

    def finished(self, request_id: str, first_token: int | None) -> bool:
        """Whether we keep its blocks: a put may still read them."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return False
        if entry.hi == 0:
            self._tell(SendFailed(entry.send.id, "transfer_failed", "ended before any of it was computed"))
            return False
        self._ended.append(Ended(entry.send.id, request_id, first_token))
        return True

    def take_ended(self) -> list[Ended]:
        """Since the last call, each once."""
        ended, self._ended = self._ended, []
        return ended
