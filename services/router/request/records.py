"""The last requests of a router with what their strategies saw and chose: so many, in so many bytes.

Sans-I/O. A record is one string of bytes (msgpack), which costs the collector nothing however many there are,
beside what it shares with others of the engines (sight.py); it is read when somebody asks. Knows requests by
their ids only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from microserve.protocol.messages.decisions import MAX_ATTEMPTS, MAX_EXPLAINED_NBYTES, Explanation
from microserve.protocol.request_id import MAX_CLIENT_CHARS, is_named, without_body_mark
from microserve.services.router.request.sight import Own, Sight, Sights
from microserve.services.router.request.trail import Trail

MAX_RECORD_NBYTES = 256 << 10
"""A longer one is kept without engines and candidates."""
OVERHEAD_NBYTES = 256
"""Of a record in memory, beside its bytes."""


class Head(NamedTuple):
    """What a record says beside the attempts; as ``Explanation``, in order of its fields."""

    strategy: str
    version: int
    tenant: bool
    attributes: Sequence[str]
    block_size: int
    num_prompt_tokens: int
    num_output_tokens: int
    max_tokens: int
    reason: str
    code: str


class Record(NamedTuple):
    request_id: str
    ended: float | None
    """None: it runs."""
    data: bytes
    """A ``_Kept``."""
    sights: Sequence[Sight | None] = ()
    """Of its attempts; none: they are left out."""


class _Kept(msgspec.Struct, frozen=True, array_like=True):
    told: Explanation
    """With age 0, its attempts without engines."""
    beside: list[tuple[Own, float]] = []
    """Of each attempt."""


class Records:
    """Of one router; all times are of the loop's clock, in seconds."""

    def __init__(self, max_requests: int, max_nbytes: int) -> None:
        """``max_requests`` 0: nothing is recorded."""
        self.nbytes = 0
        self._max_requests = max_requests
        self._max_nbytes = max_nbytes
        self.sights = Sights()
        """Of the engines, for the trails of this router's requests."""
        self._records: deque[Record] = deque()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(_Kept)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def is_on(self) -> bool:
        return self._max_requests > 0

    def add(self, request_id: str, head: Head, trails: Sequence[Trail], now: float) -> None:
        """A request has ended; the oldest records make room."""
        if not self._max_requests:
            return
        record = self.describe(request_id, head, trails, now)
        self._records.append(record)
        self.nbytes += len(record.data) + OVERHEAD_NBYTES
        for sight in record.sights:
            if sight is not None:
                sight.num_kept += 1
                if sight.num_kept == 1:
                    self.nbytes += len(sight.data) + OVERHEAD_NBYTES
        while len(self._records) > self._max_requests or self.nbytes > self._max_nbytes:
            self._forget(self._records.popleft())

    def _forget(self, record: Record) -> None:
        self.nbytes -= len(record.data) + OVERHEAD_NBYTES
        for sight in record.sights:
            if sight is not None:
                sight.num_kept -= 1
                if not sight.num_kept:
                    self.nbytes -= len(sight.data) + OVERHEAD_NBYTES

    def find(self, wanted: str, now: float, live: Sequence[Record] = ()) -> tuple[list[Explanation], int]:
        """Those of which ``wanted`` is a name, the newest first, and how many more would be too much for one
        message. ``live``: of requests that still run, from :meth:`describe`; they go first."""
        found: list[Explanation] = []
        num_left_out = nbytes = 0
        for record in self._named(wanted, live):
            nbytes += len(record.data) + sum(len(sight.data) for sight in record.sights if sight is not None)
            if nbytes > MAX_EXPLAINED_NBYTES:
                num_left_out += 1
            else:
                found.append(self._read(record, now))
        return found, num_left_out

    def _named(self, wanted: str, live: Sequence[Record]) -> Iterator[Record]:
        yield from live
        named = names(wanted)
        for record in reversed(self._records):
            if named(record.request_id):
                yield record

    def _read(self, record: Record, now: float) -> Explanation:
        kept = self._decoder.decode(record.data)
        attempts = (
            [
                attempt if sight is None else msgspec.structs.replace(attempt, engines=sight.seen(*beside))
                for attempt, sight, beside in zip(kept.told.attempts, record.sights, kept.beside, strict=True)
            ]
            if record.sights
            else kept.told.attempts
        )
        age_s = 0.0 if record.ended is None else now - record.ended
        return msgspec.structs.replace(kept.told, age_s=age_s, attempts=attempts)

    def describe(
        self, request_id: str, head: Head, trails: Sequence[Trail], ended: float | None = None
    ) -> Record:
        """What is kept of it; :meth:`find` takes that also of one that still runs."""
        kept = trails[-MAX_ATTEMPTS:]
        fields: tuple[Any, ...] = (request_id, 0.0, *head)
        told = (*fields, [trail.packed() for trail in kept], len(trails))
        data = self._encoder.encode((told, [trail.beside for trail in kept]))
        if len(data) <= MAX_RECORD_NBYTES:
            return Record(request_id, ended, data, tuple([trail.sight for trail in kept]))
        bare = [trail.packed(is_bare=True) for trail in kept]
        return Record(request_id, ended, self._encoder.encode(((*fields, bare, len(trails), True),)))


def names(wanted: str) -> Callable[[str], bool]:
    """Whether a request is called so; made for many of them: nearly all differ in their first letters."""
    starts = (wanted[:MAX_CLIENT_CHARS], without_body_mark(wanted)[:MAX_CLIENT_CHARS])
    return lambda request_id: request_id.startswith(starts) and is_named(request_id, wanted)
