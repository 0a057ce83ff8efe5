"""``traceparent`` as W3C's Trace Context has it: which trace, which span in it, whether it is recorded.

    00 - 32 hex digits: trace - 16 hex digits: span - 2 hex digits: flags      lower case, no zeros alone

Sans-I/O. What comes from clients and peers may be anything: what is not such a text is none, and never an
error, as a request must not fail for its trace.
"""

from __future__ import annotations

import os
import re
from random import Random

import msgspec

NUM_CHARS = 55
"""Of version 00."""
SAMPLED = 0x01

_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII | re.DOTALL)
_MAX_CHARS = 512
"""Longer ones, of versions to come, are not looked at."""


_random = Random()
os.register_at_fork(after_in_child=_random.seed)


class TraceParent(msgspec.Struct, frozen=True, gc=False):
    trace_id: str
    """32 hex digits in lower case, not all zero."""
    span_id: str
    """16 of them: of the span that is the parent of what is done next."""
    is_sampled: bool = True
    """Whoever began it records it."""

    @property
    def text(self) -> str:
        """Always as version 00, with the one flag that it knows."""
        return f"00-{self.trace_id}-{self.span_id}-{SAMPLED if self.is_sampled else 0:02x}"

    def child(self) -> TraceParent:
        """A new span of the same trace."""
        return TraceParent(self.trace_id, new_span_id(), self.is_sampled)


def parse(given: str | bytes | None) -> TraceParent | None:
    """None for whatever is no valid ``traceparent``. A later version is read as far as it is known."""
    if given is None or not NUM_CHARS <= len(given) <= _MAX_CHARS:
        return None
    text = given.decode("latin-1") if isinstance(given, bytes) else given
    found = _FORM.fullmatch(text)
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == "ff" or (version == "00" and more is not None):
        return None
    if not trace_id.strip("0") or not span_id.strip("0"):
        return None
    return TraceParent(trace_id, span_id, bool(int(flags, 16) & SAMPLED))


def make(*, is_sampled: bool) -> TraceParent:
    """The root of a new trace."""
    return TraceParent(f"{_random.getrandbits(128) or 1:032x}", new_span_id(), is_sampled)


def relayed(text: str) -> str:
    """What a peer sent, for the next one, if it is valid; else empty."""
    found = parse(text) if text else None
    return "" if found is None else found.text


def new_span_id() -> str:
    return f"{_random.getrandbits(64) or 1:016x}"
