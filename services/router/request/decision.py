"""What a strategy decided about one request: plain state, filled in while it decides.

send    source ──[begin, end)──> grant of the decode engine
start   the decode engine computes [begin, num_tokens) itself, or the last sender samples the first token
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from microserve.protocol.messages.kv.coding import Coding


class Send(NamedTuple):
    """One ``remote_send`` that had something to send."""

    source: str
    target: str
    begin: int
    end: int


@dataclass(slots=True)
class Decision:
    """Filled in while the strategy decides."""

    sends: list[Send] = field(default_factory=list)
    engine_id: str = ""
    """Where it generates; empty: not decided."""
    begin: int = 0
    """First prompt token that this engine computes itself (or has in its own cache)."""
    awaits_first: bool = False
    """A sender samples the first token."""
    codings: dict[Send, Coding] = field(default_factory=dict)
    """What became of sends that were asked to go by a codec."""
