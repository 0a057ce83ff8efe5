"""One grant in the receiver's table, and how far it is (table.py). Plain data."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from microserve.kvcache.grant.arrival import Arrival
from microserve.protocol.messages.kv.grant import MAX_LANES, Grant


class State(enum.Enum):
    OPEN = "open"
    SEALED = "sealed"
    QUARANTINED = "quarantined"


@dataclass(slots=True)
class Entry:
    grant: Grant
    arrival: Arrival
    request_id: str
    owner: str
    matched_blocks: list[int]
    since: float
    """When it was opened, or put into quarantine."""
    state: State = State.OPEN
    is_consumed: bool = False
    held_lanes: set[int] = field(default_factory=lambda: set(range(MAX_LANES)))
    """Lanes not yet seen free. Once free after CLOSED, a lane takes no more writes."""
