"""A span as services make it: plain state, times by this process's monotonic clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum

import msgspec

from microserve.protocol.tracing.names import Value
from microserve.protocol.tracing.traceparent import TraceParent


class Kind(Enum):
    """As OpenTelemetry has them."""

    SERVER = "server"
    """It answers somebody: a client, or another service."""
    INTERNAL = "internal"


class Event(msgspec.Struct, frozen=True):
    name: str
    at: float
    """``time.monotonic``."""
    values: Mapping[str, Value | None] = {}


class Span(msgspec.Struct, frozen=True):
    name: str
    own: TraceParent
    parent_id: str
    """16 hex digits; empty: it is the root."""
    begun: float
    ended: float
    """Both ``time.monotonic``, in seconds."""
    values: Mapping[str, Value | None]
    """By the names of names.py."""
    kind: Kind = Kind.SERVER
    events: Sequence[Event] = ()
    error: str = ""
    """Code of what it failed with; empty: it has not failed."""


Make = Callable[..., Iterable[Span]]
"""Makes those of what has ended."""
