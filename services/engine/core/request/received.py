"""Grants that this engine has given, each with the one who holds it; the book of them.

    open ── holder: the record ──> adopted ── holder: the sequence ──> settled: the blocks are its own
            │                        │
            └ lease over, or closed <┘    forgotten here; what writers may still reach is quarantined
                                                     by the grant table

Holder and grant point to each other, so an event of the grant table finds its holder without a search, and
``check_integrity`` sees a pointer that was forgotten. Plain state, under the engine's lock; ``KvMemory`` owns
the book. Knows neither what a holder is nor what has arrived (kvcache/grant).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from microserve.protocol.errors import InternalError
from microserve.protocol.messages.kv.grant import Grant


class Holder(Protocol):
    """Whose a received grant is: a ``Record`` first, a ``Sequence`` once that generates from it."""

    received: ReceivedGrant | None


@dataclass(slots=True, eq=False)
class ReceivedGrant:
    """From ``PrepRecv`` until its blocks belong to its holder, or to nobody."""

    grant: Grant
    token_ids: list[int]
    """The prompt up to the grant's end."""
    salt: str
    holder: Holder
    num_pinned: int
    """Blocks, matched ones too, that wait for KV under it; 0 once all is in."""
    is_foreign: bool = False
    """Some of its KV is of another numerics class than this engine's; known when it is taken."""
    state: list[int] = field(default_factory=list)
    """Of a hybrid model, where all of the grant matched: cached blocks of its state at the grant's end,
    with a reference on each."""
    may_lose: bool = False
    """Some of its KV may come by a codec that loses."""
    is_lossy: bool = False
    """Some of it did; known once all of it is in."""
    opened_at: float = 0.0
    probed_at: float = float("-inf")
    """When its writers were last probed for failure and death."""

    @property
    def grant_id(self) -> str:
        return self.grant.grant_id

    def hand_to(self, holder: Holder) -> None:
        """Another holder takes it over."""
        self.holder.received = None
        self.holder, holder.received = holder, self


class ReceivedGrants:
    """All received grants of one engine, by id."""

    def __init__(self) -> None:
        self._grants: dict[str, ReceivedGrant] = {}

    def __iter__(self) -> Iterator[ReceivedGrant]:
        return iter(self._grants.values())

    def add(self, received: ReceivedGrant) -> None:
        """``received.holder`` holds it from now on."""
        if received.holder.received is not None:
            raise InternalError(f"{received.holder.received.grant_id} is held already")
        self._grants[received.grant_id] = received
        received.holder.received = received

    def get(self, grant_id: str) -> ReceivedGrant:
        """Raises :class:`InternalError` for one that nobody holds."""
        received = self._grants.get(grant_id)
        if received is None:
            raise InternalError(f"grant {grant_id} belongs to nobody")
        return received

    def forget(self, received: ReceivedGrant) -> None:
        """It is over here: nobody holds it any more."""
        del self._grants[received.grant_id]
        received.holder.received = None

    @property
    def num_pinned(self) -> int:
        """Blocks that wait for KV."""
        return sum(received.num_pinned for received in self)

    @property
    def num_waiting(self) -> int:
        """Grants whose KV is not all in."""
        return sum(received.num_pinned > 0 for received in self)

    def check_integrity(self, live: Iterable[str]) -> None:
        """``live``: what the grant table has open or sealed. Raises :class:`InternalError`."""
        if (known := set(self._grants)) != (there := set(live)):
            raise InternalError(f"received grants {sorted(known ^ there)} are in one book of two")
        for received in self:
            if received.holder.received is not received:
                raise InternalError(f"grant {received.grant_id} has a holder that does not know of it")
