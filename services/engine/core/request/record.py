"""Everything an engine holds under one request id of one router, and the tables of it.

A request may be here in several parts at once: a grant that receives, sends to other engines, a sequence
that generates. Tokens travel once, so the first message that brings them makes the record, and later
messages find them here. Plain state, used under the engine's lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from microserve.protocol.errors import InvalidRequest, UnknownRequest
from microserve.protocol.messages.engine import Delta, EngineReply, Sent
from microserve.services.engine.core.request.received import ReceivedGrant
from microserve.services.engine.core.request.sequence import Sequence

IDLE_RECORD_S = 10.0
"""A record whose parts have all ended is kept this long for a further action on the same tokens."""

Key = tuple[bytes, str]
"""Router's routing id, request id."""

Part = TypeVar("Part")
"""What computes for a request: a ``Sequence`` of ours, or a request of another engine's."""


@dataclass(slots=True)
class CommitJob:
    """A ``Commit`` that waits for its KV."""

    call_id: int
    deadline: float
    sealed_blocks: list[int] | None = None
    """Block table of the grant, once all KV is in: what becomes cache when the writers have drained."""


@dataclass(slots=True, eq=False)
class RecordOf(Generic[Part]):
    owner: bytes
    request_id: str
    token_ids: list[int]
    last_used: float
    received: ReceivedGrant | None = None
    """The open grant, until a sequence adopts it, ``Commit`` takes it, or it is closed."""
    asked: Part | None = None
    """What waits for blocks to receive into; an engine that owns its blocks has them at once."""
    commit: CommitJob | None = None
    generate: Part | None = None
    sends: dict[tuple[str, int], Part] = field(default_factory=dict)
    """By grant id and lane."""
    sent: dict[tuple[str, int], Sent] = field(default_factory=dict)
    """Answers of sends that have ended, so that a repeated call gets the same one."""
    adapter: str = ""
    """With which all of it is computed; empty: the model alone."""
    aborted: bool = False
    """Parts in the running step end with it; a new action under the id starts a new record."""

    @property
    def is_idle(self) -> bool:
        return self.received is None and self.asked is None and self.generate is None and not self.sends

    def holds(self, part: Part) -> bool:
        return any(part is each for each in (self.generate, self.asked, *self.sends.values()))


Record = RecordOf[Sequence]


class Records(Generic[Part]):
    """Records by owner and request id."""

    def __init__(self) -> None:
        self._records: dict[Key, RecordOf[Part]] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[RecordOf[Part]]:
        return iter(list(self._records.values()))

    def find(self, owner: bytes, request_id: str) -> RecordOf[Part] | None:
        return self._records.get((owner, request_id))

    def open(
        self, owner: bytes, request_id: str, token_ids: list[int] | None, now: float, adapter: str = ""
    ) -> RecordOf[Part]:
        """The record, made from the tokens if they came along. Raises :class:`UnknownRequest` without, and
        :class:`InvalidRequest` for tokens, or an adapter, that differ from those that work here."""
        record = self._records.get((owner, request_id))
        if record is None or record.aborted:
            if token_ids is None:
                raise UnknownRequest(f"no tokens here for request {request_id!r}", field="request_id")
            record = self._records[(owner, request_id)] = RecordOf(owner, request_id, token_ids, now)
        elif token_ids is not None and record.is_idle:
            record.token_ids = token_ids
        elif token_ids is not None and token_ids != record.token_ids:
            raise InvalidRequest(f"request {request_id!r} runs here with other tokens", field="tokens")
        if not record.is_idle and adapter != record.adapter:
            raise InvalidRequest(
                f"request {request_id!r} runs here with adapter {record.adapter!r}, not {adapter[:128]!r}",
                field="adapter",
            )
        record.adapter = adapter
        record.last_used = now
        return record

    def drop(self, record: RecordOf[Part]) -> None:
        key = (record.owner, record.request_id)
        if self._records.get(key) is record:
            del self._records[key]

    def of(self, owner: bytes) -> list[RecordOf[Part]]:
        return [record for key, record in self._records.items() if key[0] == owner]

    def purge(self, now: float) -> None:
        """Drop what has been idle for :data:`IDLE_RECORD_S`."""
        stale = [r for r in self._records.values() if r.is_idle and now - r.last_used > IDLE_RECORD_S]
        for record in stale:
            self.drop(record)


@dataclass(slots=True)
class Outbox:
    """What the core has to say to routers, in order; the service empties it."""

    replies: list[tuple[bytes, EngineReply]] = field(default_factory=list)
    deltas: list[tuple[bytes, Delta]] = field(default_factory=list)

    def take(self) -> Outbox:
        taken = Outbox(self.replies, self.deltas)
        self.replies, self.deltas = [], []
        return taken
