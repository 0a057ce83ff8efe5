"""Where one request's time went: marks by the router's clock, made into phases that add up.

Sans-I/O. What did not happen (no grant, no send) takes no time; what ran side by side is cut at the border
of the later phase, so that the sum is the wall time whatever the strategy did.
"""

from __future__ import annotations

from itertools import pairwise

from microserve.protocol.messages.engine import Timings
from microserve.protocol.messages.router import Phases


class PhaseClock:
    """Marks of one request. All times are of the loop's clock, in seconds."""

    def __init__(self, now: float) -> None:
        self.received = now
        self._routed: float | None = None
        self._granted: float | None = None
        self._prefilled: float | None = None
        self._transferred: float | None = None
        self._accepted: float | None = None
        self._first_token: float | None = None

    def routed(self, now: float) -> None:
        """The first action leaves."""
        if self._routed is None:
            self._routed = now

    def granted(self, now: float) -> None:
        self._granted = now

    def sent(self, begun: float, now: float, timings: Timings) -> None:
        """A send that began at ``begun`` is complete; the sender says how long it computed."""
        self._prefilled = min(now, begun + timings.queued_s + timings.prefill_s)
        self._transferred = now

    def accepted(self, now: float) -> None:
        self._accepted = now

    def first_token(self, now: float) -> None:
        if self._first_token is None:
            self._first_token = now

    def phases(self, now: float, timings: Timings | None = None) -> Phases:
        """Until ``now``; ``timings`` are those of the engine that decoded, if it said them."""
        first = self._first_token
        admitted = None
        if self._accepted is not None and timings is not None:
            admitted = self._accepted + timings.arrival_s + timings.queued_s
            admitted = admitted if first is None else min(admitted, first)
        marks = [self._routed, self._granted, self._prefilled, self._transferred, admitted, first, now]
        borders = [self.received]
        for mark in marks:
            borders.append(borders[-1] if mark is None else min(max(mark, borders[-1]), now))
        routed, granted, prefilled, transferred, admitted_s, first_s, decoded = (
            later - earlier for earlier, later in pairwise(borders)
        )
        return Phases(
            now - self.received, routed, granted, prefilled, transferred, admitted_s, first_s, decoded
        )
