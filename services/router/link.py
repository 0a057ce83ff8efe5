"""How fast KV moves between two engines, as their senders measured it.

Sans-I/O; kept by the router across requests. What nobody has measured is 0, and never guessed here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from microserve.protocol.messages.engine import Sent

SMOOTHING = 0.2
"""Weight of the newest send."""


@dataclass(slots=True)
class _Link:
    """Means of bytes and of seconds: their ratio lets large sends count for more than small ones, whose time
    is mostly the fixed cost of a put."""

    nbytes: float
    seconds: float


class Links:
    """Measured goodput by (source, target); an engine that ended is forgotten, its next life may stand
    elsewhere."""

    def __init__(self) -> None:
        self.kv_nbytes_per_token = 0.0
        """Bytes of one token's KV, all layers, from the sends so far; 0: none yet."""
        self._links: dict[tuple[str, str], _Link] = {}

    def measure(self, source: str, target: str, sent: Sent) -> None:
        """Take in what a sender says of a send that is complete."""
        seconds = sent.timings.transfer_s
        if sent.nbytes <= 0 or sent.sent <= 0:
            return
        self.kv_nbytes_per_token = _smoothed(self.kv_nbytes_per_token, sent.nbytes / sent.sent)
        if not 0.0 < seconds < math.inf:  # too short for the sender's clock, or no number
            return
        link = self._links.setdefault((source, target), _Link(sent.nbytes, seconds))
        link.nbytes = _smoothed(link.nbytes, sent.nbytes)
        link.seconds = _smoothed(link.seconds, seconds)

    def goodput(self, source: str, target: str) -> float:
        """Bytes a second while a put runs; 0 where nothing has been measured."""
        link = self._links.get((source, target))
        return link.nbytes / link.seconds if link is not None else 0.0

    def forget(self, engine_id: str) -> None:
        for pair in [pair for pair in self._links if engine_id in pair]:
            del self._links[pair]


def _smoothed(known: float, sample: float) -> float:
    return known + SMOOTHING * (sample - known) if known else float(sample)
