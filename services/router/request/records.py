"""The last requests of a router with what their strategies saw and chose: so many, in so many bytes.

Sans-I/O. A record is one string of bytes (msgpack), which costs the collector nothing however many there are;
it is read when somebody asks. Knows requests by their ids only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from microserve.protocol.messages.decisions import MAX_ATTEMPTS, MAX_EXPLAINED_NBYTES, Explanation
from microserve.protocol.request_id import MAX_CLIENT_CHARS, is_named, without_body_mark
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


class _Record(NamedTuple):
    request_id: str
    ended: float
    data: bytes
    """An ``Explanation`` with age 0."""


class Records:
    """Of one router; all times are of the loop's clock, in seconds."""

    def __init__(self, max_requests: int, max_nbytes: int) -> None:
        """``max_requests`` 0: nothing is recorded."""
        self.nbytes = 0
        self._max_requests = max_requests
        self._max_nbytes = max_nbytes
        self._records: deque[_Record] = deque()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Explanation)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def is_on(self) -> bool:
        return self._max_requests > 0

    def add(self, request_id: str, head: Head, trails: Sequence[Trail], now: float) -> None:
        """A request has ended; the oldest records make room."""
        if not self._max_requests:
            return
        data = self.describe(request_id, head, trails)
        self._records.append(_Record(request_id, now, data))
        self.nbytes += len(data) + OVERHEAD_NBYTES
        while len(self._records) > self._max_requests or self.nbytes > self._max_nbytes:
            self.nbytes -= len(self._records.popleft().data) + OVERHEAD_NBYTES

    def find(self, wanted: str, now: float, live: Sequence[bytes] = ()) -> tuple[list[Explanation], int]:
        """Those of which ``wanted`` is a name, the newest first, and how many more would be too much for one
        message. ``live``: of requests that still run, from :meth:`describe`; they go first."""
        found: list[Explanation] = []
        num_left_out = nbytes = 0
        for ended, data in self._named(wanted, live):
            nbytes += len(data)
            if nbytes > MAX_EXPLAINED_NBYTES:
                num_left_out += 1
                continue
            each = self._decoder.decode(data)
            found.append(msgspec.structs.replace(each, age_s=0.0 if ended is None else now - ended))
        return found, num_left_out

    def _named(self, wanted: str, live: Sequence[bytes]) -> Iterator[tuple[float | None, bytes]]:
        yield from ((None, data) for data in live)
        named = names(wanted)
        for record in reversed(self._records):
            if named(record.request_id):
                yield record.ended, record.data

    def describe(self, request_id: str, head: Head, trails: Sequence[Trail]) -> bytes:
        """What is kept of it; :meth:`find` takes that also of one that still runs."""
        kept = trails[-MAX_ATTEMPTS:]
        fields: tuple[Any, ...] = (request_id, 0.0, *head)
        data = self._encoder.encode((*fields, [trail.packed() for trail in kept], len(trails)))
        if len(data) <= MAX_RECORD_NBYTES:
            return data
        bare = [trail.packed(is_bare=True) for trail in kept]
        return self._encoder.encode((*fields, bare, len(trails), True))


def names(wanted: str) -> Callable[[str], bool]:
    """Whether a request is called so; made for many of them: nearly all differ in their first letters."""
    starts = (wanted[:MAX_CLIENT_CHARS], without_body_mark(wanted)[:MAX_CLIENT_CHARS])
    return lambda request_id: request_id.startswith(starts) and is_named(request_id, wanted)
