"""Receives on the scheduler's side: parked requests whose blocks peers write into, and who waits for them.

    NEW ── blocks ──> PARKED ── the worker reports ──> PROMOTED ── its one token ──> PINNED
     │ aborted          │ aborted                          │ used by then               │ used, or DROP
     v                  v                                  v                            v
    (gone)          ABANDONED ── the worker reports ─────> (gone)   <── reported ── RELEASING

vLLM keeps a parked request's blocks until the worker reports it, once; a report of one that is unknown or
runs is an assertion there, and the engine's end. So every step hands the worker those that it may report
(``watched``), and by which word. A promoted one is a request like any other: its blocks are in the
prefix cache, it computes its last token again, and when it has ended we keep its blocks until they are used
(somebody generates from them) or the front lets go.

Owns that state. Knows ids and words; neither vLLM's objects nor its blocks' insides.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from microserve.services.engine.vllm.link import (
    DROP,
    TAKE,
    Allocated,
    Freed,
    Generate,
    Notice,
    Receive,
    Received,
)


class _State(enum.Enum):
    NEW = "new"
    PARKED = "parked"
    ABANDONED = "abandoned"
    PROMOTED = "promoted"
    PINNED = "pinned"
    RELEASING = "releasing"


@dataclass(slots=True)
class _Entry:
    id: int
    end: int
    state: _State = _State.NEW
    granted: list[int] = field(default_factory=list)
    is_used: bool = False
    """Somebody has generated from it."""


@dataclass(frozen=True, slots=True)
class Watched:
    """A receive that vLLM keeps blocks for: the worker reports it when its word is TAKE, or, if its request
    is aborted, DROP."""

    id: int
    request_id: str
    is_aborted: bool
    blocks: list[int]
    """Of an aborted one, those that were granted."""


class Receives:
    def __init__(self, block_size: int, fate: Callable[[int], int], tell: Callable[[Notice], None]) -> None:
        """``fate``: the word of a receive; ``tell``: the front."""
        self._block_size = block_size
        self._fate = fate
        self._tell = tell
        self._entries: dict[str, _Entry] = {}
        """By vLLM's id of the request."""
        self._request_ids: dict[int, str] = {}
        self._generates: dict[str, int] = {}

    def add(self, request_id: str, receive: Receive, num_prompt_tokens: int) -> str | None:
        """A request came. One that cannot be parked is an ordinary one; why is returned."""
        if receive.id in self._request_ids:
            return f"receive {receive.id} is there already"
        if receive.end != num_prompt_tokens:
            self._tell(Freed(receive.id))
            return f"receive {receive.id} ends at {receive.end}, its prompt at {num_prompt_tokens}"
        self._entries[request_id] = _Entry(receive.id, receive.end)
        self._request_ids[receive.id] = request_id
        return None

    def add_generate(self, request_id: str, generate: Generate) -> None:
        self._generates[request_id] = generate.after

    def num_external(self, request_id: str, num_local: int) -> tuple[int | None, bool]:
        """What ``get_num_new_matched_tokens`` answers; asked any number of times, changes nothing."""
        entry = self._entries.get(request_id)
        if entry is not None:
            # Preempted after its promotion: it computes what it has lost, as any other.
            num_tokens = max(entry.end - num_local, 0) if entry.state is _State.NEW else 0
            return num_tokens, num_tokens > 0
        after = self._entries.get(self._request_ids.get(self._generates.get(request_id, -1), ""))
        is_early = after is not None and after.state in (_State.NEW, _State.PARKED)
        return (None, False) if is_early else (0, False)

    def allocated(self, request_id: str, blocks: list[int], num_external: int) -> None:
        """``blocks``: all of the request's, matched ones first."""
        entry = self._entries.get(request_id)
        if entry is not None and entry.state is _State.NEW:
            if num_external == 0:  # vLLM would not wait: for prompt logprobs, say
                self._forget(request_id)
                return
            entry.state = _State.PARKED
            matched = entry.end - num_external
            entry.granted = blocks[matched // self._block_size :]
            self._tell(Allocated(entry.id, matched, entry.granted))
            return
        used = self._entries.get(self._request_ids.get(self._generates.get(request_id, -1), ""))
        if used is not None:
            used.is_used = True

    def finished(self, request_id: str) -> bool:
        """A request has ended or is aborted: whether we keep its blocks."""
        self._generates.pop(request_id, None)
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        if entry.state is _State.PARKED:
            entry.state = _State.ABANDONED
            return True
        if entry.state is _State.PROMOTED and not entry.is_used and self._fate(entry.id) != DROP:
            entry.state = _State.PINNED
            return True
        self._forget(request_id)
        return False

    def watched(self) -> list[Watched]:
        """For this step's metadata."""
        watched = []
        for request_id, entry in self._entries.items():
            if entry.state is _State.PARKED:
                watched.append(Watched(entry.id, request_id, False, []))
            elif entry.state is _State.ABANDONED:
                watched.append(Watched(entry.id, request_id, True, entry.granted))
        return watched

    def releases(self) -> list[str]:
        """Ended requests whose blocks nobody needs any more, each once: the worker is to say so."""
        released = []
        for request_id, entry in self._entries.items():
            if entry.state is _State.PINNED and (entry.is_used or self._fate(entry.id) == DROP):
                entry.state = _State.RELEASING
                released.append(request_id)
        return released

    def reported(self, request_ids: set[str]) -> None:
        """The worker has reported these: promoted, or given up."""
        for request_id in request_ids & self._entries.keys():
            entry = self._entries[request_id]
            if entry.state is _State.PARKED:
                entry.state = _State.PROMOTED
                self._tell(Received(entry.id))
            else:
                self._forget(request_id)

    def released(self, request_ids: set[str]) -> None:
        for request_id in request_ids & self._entries.keys():
            self._forget(request_id)

    @property
    def num_held(self) -> int:
        """Requests whose blocks are kept for us, or will be."""
        return len(self._entries)

    def _forget(self, request_id: str) -> None:
        entry = self._entries.pop(request_id)
        del self._request_ids[entry.id]
        self._tell(Freed(entry.id))


class Reports:
    """The worker's part: which of the watched are to be reported now; each once."""

    def __init__(self, fate: Callable[[int], int]) -> None:
        self._fate = fate
        self._reported: set[str] = set()

    def due(self, watched: list[Watched]) -> list[Watched]:
        """A step may be made before the last one's reports are read, and watch what is reported already."""
        self._reported &= {each.request_id for each in watched}
        due = [each for each in watched if each.request_id not in self._reported and self._is_due(each)]
        self._reported.update(each.request_id for each in due)
        return due

    def _is_due(self, watched: Watched) -> bool:
        fate = self._fate(watched.id)
        return fate == TAKE or (watched.is_aborted and fate == DROP)
