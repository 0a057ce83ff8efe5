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

from microserve.protocol.messages.strategy.decisions import MAX_ATTEMPTS, MAX_EXPLAINED_NBYTES, Explanation
from microserve.protocol.request_id import MAX_CLIENT_CHARS, is_named, without_body_mark
from microserve.services.router.request.sight import Own, Sight, Sights
from microserve.services.router.request.trail import Trail

MAX_RECORD_NBYTES = 256 << 10
"""A longer one is kept without engines and candidates."""
OVERHEAD_NBYTES = 64
"""Of a record in memory, beside its bytes."""
MAX_ID_NBYTES = 4 * MAX_CLIENT_CHARS + 16
"""Where a record's bytes have the beginning of its id, whatever letters it is of."""


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


class _Record(msgspec.Struct, frozen=True, array_like=True):
    """What is kept of a request. Its id comes first, so that it is found without reading the rest."""

    request_id: str
    ended: float | None
    """None: it runs."""
    told: Explanation
    """With age 0, its attempts without engines."""
    beside: list[tuple[int, Own, float]] = []
    """Of each attempt: the number of its sight (0: none), this router's own numbers, and when that was.
    Empty: they are left out."""


class Records:
    """Of one router; all times are of the loop's clock, in seconds."""

    def __init__(self, max_requests: int, max_nbytes: int) -> None:
        """``max_requests`` 0: nothing is recorded."""
        self.nbytes = 0
        self._max_requests = max_requests
        self._max_nbytes = max_nbytes
        self.sights = Sights()
        """Of the engines, for the trails of this router's requests."""
        self._records: deque[bytes] = deque()
        """One object each: what is cold when it goes costs a miss of the cache for every part of it."""
        self._kept: dict[int, Sight] = {}
        """Sights of these, by number, the oldest first."""
        self._num_added = 0
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(_Record)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[bytes]:
        """As they are kept, the oldest first."""
        return iter(self._records)

    @property
    def is_on(self) -> bool:
        return self._max_requests > 0

    def add(self, request_id: str, head: Head, trails: Sequence[Trail], now: float) -> None:
        """A request has ended; the oldest records make room."""
        if not self._max_requests:
            return
        data = self.describe(request_id, head, trails, now)
        self._records.append(data)
        self._num_added += 1
        self.nbytes += len(data) + OVERHEAD_NBYTES
        while self._records and (len(self._records) > self._max_requests or self.nbytes > self._max_nbytes):
            self.nbytes -= len(self._records.popleft()) + OVERHEAD_NBYTES
            self._forget_sights()

    def _keep(self, sight: Sight) -> int:
        """Its number, with which a record names it."""
        if sight.number not in self._kept:
            self._kept[sight.number] = sight
            self.nbytes += len(sight.data) + OVERHEAD_NBYTES
        sight.last_record = self._num_added
        return sight.number

    def _forget_sights(self) -> None:
        """Those that no record names any more; nearly in the order in which they were seen."""
        oldest = self._num_added - len(self._records)
        while self._kept:
            number = next(iter(self._kept))
            if self._kept[number].last_record >= oldest:
                break
            self.nbytes -= len(self._kept.pop(number).data) + OVERHEAD_NBYTES

    def find(self, wanted: str, now: float, live: Sequence[bytes] = ()) -> tuple[list[Explanation], int]:
        """Those of which ``wanted`` is a name, the newest first, and how many more would be too much for one
        message. ``live``: of requests that still run, from :meth:`describe`; they go first."""
        found: list[Explanation] = []
        num_left_out = nbytes = 0
        for record in self._named(wanted, live):
            each = self._read(record, now)
            nbytes += len(self._encoder.encode(each))
            if nbytes > MAX_EXPLAINED_NBYTES:
                num_left_out += 1
            else:
                found.append(each)
        return found, num_left_out

    def _named(self, wanted: str, live: Sequence[bytes]) -> Iterator[_Record]:
        yield from map(self._decoder.decode, live)
        named, starts = names(wanted), [each.encode() for each in _starts(wanted)]
        for data in reversed(self._records):
            if any(start in data[:MAX_ID_NBYTES] for start in starts):
                record = self._decoder.decode(data)
                if named(record.request_id):
                    yield record

    def _read(self, record: _Record, now: float) -> Explanation:
        attempts = record.told.attempts
        if record.beside:
            attempts = [
                msgspec.structs.replace(attempt, engines=self._kept[number].seen(own, at))
                if number
                else attempt
                for attempt, (number, own, at) in zip(attempts, record.beside, strict=True)
            ]
        age_s = 0.0 if record.ended is None else now - record.ended
        return msgspec.structs.replace(record.told, age_s=age_s, attempts=attempts)

    def describe(
        self, request_id: str, head: Head, trails: Sequence[Trail], ended: float | None = None
    ) -> bytes:
        """What is kept of it; :meth:`find` takes that also of one that still runs."""
        kept = trails[-MAX_ATTEMPTS:]
        fields: tuple[Any, ...] = (request_id, 0.0, *head)
        told = (*fields, [trail.packed() for trail in kept], len(trails))
        beside = [(0 if trail.sight is None else self._keep(trail.sight), *trail.beside) for trail in kept]
        data = self._encoder.encode((request_id, ended, told, beside))
        if len(data) <= MAX_RECORD_NBYTES:
            return data
        bare = [trail.packed(is_bare=True) for trail in kept]
        return self._encoder.encode((request_id, ended, (*fields, bare, len(trails), True)))


def _starts(wanted: str) -> tuple[str, str]:
    """With one of these the id begins of every request that is called so."""
    return wanted[:MAX_CLIENT_CHARS], without_body_mark(wanted)[:MAX_CLIENT_CHARS]


def names(wanted: str) -> Callable[[str], bool]:
    """Whether a request is called so; made for many of them: nearly all differ in their first letters."""
    starts = _starts(wanted)
    return lambda request_id: request_id.startswith(starts) and is_named(request_id, wanted)
