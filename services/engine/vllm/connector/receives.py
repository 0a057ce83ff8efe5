"""Receives on the scheduler's side: parked requests whose blocks peers write into, and who waits for them.

    NEW ── blocks ──> PARKED ── the worker reports ──> PROMOTED ── its one token ──> PINNED
     │ aborted          │ aborted                          │ used by then               │ used, or DROP
     v                  v                                  v                            v
    (gone)          ABANDONED ── the worker reports ─────> (gone)   <── reported ── RELEASING

    early   PARKED ── START: reported ──> PROMOTED ── its step: all in, or failed ──> PINNED ── TAKE, or DROP

vLLM keeps a parked request's blocks until the worker reports it, once; a report of one that is unknown or
runs is an assertion there, and the engine's end. So every step hands the worker those that it may report
(``watched``), and by which word. A promoted one is a request like any other: its blocks are in the
prefix cache, it computes its last token again, and when it has ended we keep its blocks until they are used
(somebody generates from them) or the front lets go.

One that is started early is promoted before its KV is in: the step that computes it waits for each layer
(loading.py) and fails all that it computed from it if one does not come. Until the front says TAKE, writers
may hold a lane: its blocks stay its own whatever has ended, nobody but its own generation finds them in the
prefix cache, and what is not taken leaves the cache before anybody may have it. All of this rests on steps
that do not overlap: a step is scheduled when the last one's output has been read (limits.py).

The prefix cache has whole blocks only. Who generates from a receive computes what is behind its last one
again, as it would with that prefix in its cache; but a stream that goes on, with its next token's row and no
other to compute, gets a copy in a block of its own, in the step that admits it (``Copy``): its step is the
decode step, bit for bit, that it would have been where the stream began.

Owns that state. Knows ids and words; neither vLLM's objects nor its blocks' insides.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from microserve.protocol.errors import InternalError
from microserve.services.engine.vllm.connector.orders import Copy, Release, Started, Watched
from microserve.services.engine.vllm.link import (
    DROP,
    START,
    TAKE,
    WAIT,
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
    tokens: Sequence[int] = ()
    """Its prompt."""
    matched: int = 0
    is_early: bool = False
    """Promoted before its KV was in, and not taken yet."""
    is_run: bool = False
    """... and a step has computed it."""
    is_in: bool = False
    """... with all of its KV in."""
    users: set[str] = field(default_factory=set)
    """Requests that generate from it and have not ended."""


class Receives:
    def __init__(
        self,
        block_size: int,
        fate: Callable[[int], int],
        tell: Callable[[Notice], None],
        evict: Callable[[set[int]], None] = lambda blocks: None,
    ) -> None:
        """``fate``: the word of a receive; ``tell``: the front; ``evict``: blocks, from the prefix cache."""
        self._block_size = block_size
        self._evict = evict
        self._fate = fate
        self._tell = tell
        self._entries: dict[str, _Entry] = {}
        """By vLLM's id of the request."""
        self._request_ids: dict[int, str] = {}
        self._generates: dict[str, int] = {}
        self._copies: list[Copy] = []

    def add(
        self, request_id: str, receive: Receive, num_prompt_tokens: int, tokens: Sequence[int] = ()
    ) -> str | None:
        """A request came. One that cannot be parked is an ordinary one; why is returned."""
        if receive.id in self._request_ids:
            return f"receive {receive.id} is there already"
        if receive.end != num_prompt_tokens:
            self._tell(Freed(receive.id))
            return f"receive {receive.id} ends at {receive.end}, its prompt at {num_prompt_tokens}"
        self._entries[request_id] = _Entry(receive.id, receive.end, tokens=tokens)
        self._request_ids[receive.id] = request_id
        return None

    def add_generate(self, request_id: str, generate: Generate) -> None:
        self._generates[request_id] = generate.after

    def num_external(
        self, request_id: str, num_local: int, tokens: Sequence[int] = ()
    ) -> tuple[int | None, bool]:
        """What ``get_num_new_matched_tokens`` answers; asked any number of times, changes nothing.
        ``tokens``: all that the request has."""
        entry = self._entries.get(request_id)
        if entry is not None and entry.is_early and entry.is_run:
            # Preempted with its blocks, into which somebody may write. Nothing is right from here on.
            raise InternalError(f"vLLM has preempted receive {entry.id}, whose KV is not settled")
        if self._is_theirs(request_id, num_local, tokens):
            return None, False
        if entry is not None:
            # Preempted after its promotion: it computes what it has lost, as any other.
            num_tokens = max(entry.end - num_local, 0) if entry.state is _State.NEW else 0
            return num_tokens, num_tokens > 0
        after = self._entries.get(self._request_ids.get(self._generates.get(request_id, -1), ""))
        if after is None:
            return 0, False
        if after.state in (_State.NEW, _State.PARKED):
            return None, False
        return self._num_behind(after, num_local, tokens), False

    def _num_behind(self, entry: _Entry, num_local: int, tokens: Sequence[int]) -> int:
        """So many tokens of the receive are to be copied for a user who finds ``num_local`` in the cache."""
        tail = entry.end % self._block_size
        is_there = entry.state in (_State.PROMOTED, _State.PINNED) and self._fate(entry.id) == TAKE
        if entry.is_early or not is_there or not tail or num_local != entry.end - tail:
            return 0
        goes_on = len(tokens) == entry.end + 1 and list(tokens[:-1]) == list(entry.tokens)
        return tail if goes_on else 0

    def allocated(self, request_id: str, blocks: list[int], num_external: int) -> None:
        """``blocks``: all of the request's, matched ones first."""
        entry = self._entries.get(request_id)
        if entry is not None and entry.state is _State.NEW:
            if num_external == 0:  # vLLM would not wait: for prompt logprobs, say
                self._forget(request_id)
                return
            entry.state = _State.PARKED
            entry.matched = entry.end - num_external
            entry.granted = blocks[entry.matched // self._block_size :]
            self._tell(Allocated(entry.id, entry.matched, entry.granted))
            return
        used = self._entries.get(self._request_ids.get(self._generates.get(request_id, -1), ""))
        if used is not None:
            used.is_used = True
            used.users.add(request_id)
            if num_external:
                self._copies.append(Copy(used.granted[-1], blocks[used.end // self._block_size]))

    def started(self, scheduled: Iterable[str]) -> list[Started]:
        """Of those requests that a step computes: its layers are to be waited for."""
        started = []
        for request_id in scheduled:
            entry = self._entries.get(request_id)
            if entry is not None and entry.is_early and not entry.is_run:
                entry.is_run = True
                started.append(Started(entry.id, entry.matched, entry.end, entry.granted))
        return started

    def ran(self, invalid_blocks: set[int]) -> None:
        """The step's output is read. vLLM has failed who runs on ``invalid_blocks``; whoever was aborted
        meanwhile it does not know any more, and neither his nor their blocks may be found again."""
        for entry in self._entries.values():
            if entry.is_early and entry.is_run and not entry.is_in:
                if invalid_blocks.isdisjoint(entry.granted):
                    entry.is_in = True
                else:
                    self._evict(set(entry.granted))

    def finished(self, request_id: str, blocks: Sequence[int] = (), *, has_output: bool = True) -> bool:
        """A request has ended or is aborted: whether we keep its ``blocks``. One without a token, which has
        begun behind KV that was not in, may have cached what it computed from that."""
        used = self._entries.get(self._request_ids.get(self._generates.pop(request_id, -1), ""))
        if used is not None and request_id in used.users:
            used.users.discard(request_id)
            if used.is_early and not used.is_in and not has_output:
                self._evict(set(blocks[used.matched // self._block_size :]))
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        if entry.state is _State.PARKED:
            entry.state = _State.ABANDONED
            return True
        if entry.state is _State.PROMOTED and (
            entry.is_early or (not entry.is_used and self._fate(entry.id) != DROP)
        ):
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

    def copies(self) -> list[Copy]:
        """For this step; each once."""
        copies, self._copies = self._copies, []
        return copies

    @property
    def is_resting(self) -> bool:
        """There are receives that vLLM keeps blocks for, and all of them wait for their writers."""
        watched = self.watched()
        return bool(watched) and all(self._fate(each.id) == WAIT for each in watched)

    def releases(self) -> list[Release]:
        """Ended requests whose blocks nobody needs any more, each once: the worker is to say so."""
        released = []
        for request_id, entry in self._entries.items():
            fate = self._fate(entry.id)
            if entry.is_early and fate == TAKE:
                entry.is_early = False
                self._tell(Received(entry.id))
            if entry.state is not _State.PINNED:
                continue
            if not entry.is_early and (entry.is_used or fate == DROP):
                entry.state = _State.RELEASING
                released.append(Release(request_id, []))
            elif entry.is_early and fate == DROP and not entry.users:
                entry.state = _State.RELEASING
                self._evict(set(entry.granted))
                released.append(Release(request_id, entry.granted))
        return released

    def reported(self, request_ids: set[str]) -> None:
        """The worker has reported these: promoted, or given up."""
        for request_id in request_ids & self._entries.keys():
            entry = self._entries[request_id]
            fate = self._fate(entry.id)
            if entry.state is _State.PARKED:
                entry.state = _State.PROMOTED
                entry.is_early = fate != TAKE
                if not entry.is_early:
                    self._tell(Received(entry.id))
            elif fate == START:
                # It was reported to be promoted and has been aborted since: vLLM would give its blocks away.
                raise InternalError(f"receive {entry.id} was aborted behind its early start")
            else:
                self._forget(request_id)

    def released(self, request_ids: set[str]) -> None:
        for request_id in request_ids & self._entries.keys():
            self._forget(request_id)

    @property
    def num_held(self) -> int:
        """Requests whose blocks are kept for us, or will be."""
        return len(self._entries)

    def _is_theirs(self, request_id: str, num_local: int, tokens: Sequence[int]) -> bool:
        """What it would find in the prefix cache may be a block of a receive that is not taken yet."""
        after = self._generates.get(request_id)
        return any(
            entry.is_early
            and entry.id != after
            and self._entries.get(request_id) is not entry
            and num_local > entry.matched
            and list(tokens[: (n := entry.matched + self._block_size)]) == list(entry.tokens[:n])
            for entry in self._entries.values()
        )

    def _forget(self, request_id: str) -> None:
        entry = self._entries.pop(request_id)
        del self._request_ids[entry.id]
        self._tell(Freed(entry.id))
