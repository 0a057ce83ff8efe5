"""What a comparison of two versions needs of each: sums over requests, of a fixed size. Sans-I/O.

Times go in as logarithms, beside what is known of a request whoever serves it: how much of its prompt no
engine held when it came, how long the prompt is, and how many tokens it has brought (the same by its seed).
What a strategy itself brings about, such as hits of the cache where it has sent the request, must not be
among these: the comparison would take it for the request's luck. How soon the first token could be
(admission.py) was tried as well: in the simulation it told nothing more of the times of strategies than
these.
"""

from __future__ import annotations

from math import log, log1p
from typing import NamedTuple

from microserve.protocol.messages.engine import Usage
from microserve.protocol.messages.router import Ended
from microserve.protocol.messages.strategy.scores import FIRST_BUCKET_S, NUM_SUMS, Side


class Timing(NamedTuple):
    """Natural logarithms of seconds; None where there is no such time."""

    ttft: float | None = None
    tpot: float | None = None
    jct: float | None = None


NO_TIMES = Timing()
_SHORTEST_S = FIRST_BUCKET_S
"""What is shorter counts as this: tokens that came in one message have no time between them, and the
logarithm of next to nothing would rule over all others."""


def timing_of(ended: Ended, failed: bool) -> Timing:
    """Times only where the strategy itself brought the request to its end."""
    if failed or ended.reason not in ("stop", "length"):
        return NO_TIMES
    phases, num_output = ended.phases, ended.usage.output_tokens
    decoded_s = phases.decoded_s
    return Timing(
        log(max(phases.total_s - decoded_s, _SHORTEST_S)) if num_output else None,
        log(max(decoded_s / (num_output - 1), _SHORTEST_S)) if num_output > 1 else None,
        log(max(phases.total_s, _SHORTEST_S)),
    )


class Sums:
    """Of one version."""

    __slots__ = ("_jct", "_num_failed", "_num_requests", "_tpot", "_ttft")

    def __init__(self) -> None:
        self._num_requests = self._num_failed = 0
        self._ttft, self._tpot, self._jct = ([0.0] * NUM_SUMS for _ in range(3))

    def add(self, failed: bool, timing: Timing, num_unheld: int, usage: Usage) -> None:
        """A request has ended; ``failed``: with an error, or by the strategy's mistake. ``num_unheld``:
        prompt tokens that no engine held when it came."""
        self._num_requests += 1
        self._num_failed += failed
        if timing.jct is None:
            return
        given = (log1p(num_unheld), log1p(usage.prompt_tokens), log1p(usage.output_tokens))
        _add(self._jct, *given, timing.jct)
        if timing.ttft is not None:
            _add(self._ttft, *given, timing.ttft)
        if timing.tpot is not None:
            _add(self._tpot, *given, timing.tpot)

    def told(self) -> Side:
        times = [[*sums] if sums[0] else [] for sums in (self._ttft, self._tpot, self._jct)]
        return Side(self._num_requests, self._num_failed, *times)


def _add(sums: list[float], u: float, v: float, w: float, y: float) -> None:
    """The products of (1, u, v, w, y), each pair once: written out, for it is done for every request."""
    sums[0] += 1.0
    sums[1] += u
    sums[2] += v
    sums[3] += w
    sums[4] += y
    sums[5] += u * u
    sums[6] += u * v
    sums[7] += u * w
    sums[8] += u * y
    sums[9] += v * v
    sums[10] += v * w
    sums[11] += v * y
    sums[12] += w * w
    sums[13] += w * y
    sums[14] += y * y
