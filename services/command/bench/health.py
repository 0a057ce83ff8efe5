"""Was it the server that was measured, or the load generator? Pure: samples in, complaints out.

A load generator without time to read sees every answer late, and one that sends late measures another load
than the one it names. Both are said by how much, and a report is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from microserve.services.command.bench.report import percentile
from microserve.services.command.bench.task import Health, Outcome

SHORTEST_S = 1.0
"""Of a run whose share of a core says anything: a shorter one is all beginning."""


class Limits(msgspec.Struct, frozen=True):
    """Beyond these a run is not to be believed."""

    lag_ms: float = 10.0
    """p99 of how late an event loop woke."""
    slip_ms: float = 20.0
    """p99 of how much later than planned a request was sent."""
    cpu_share: float = 0.9
    """Of one core, by one process."""


class Verdict(msgspec.Struct, frozen=True):
    """The worst process counts; percentiles are of all its samples."""

    lag_p99_ms: float
    lag_max_ms: float
    slip_p99_ms: float
    slip_max_ms: float
    cpu_share: float
    num_processes: int
    complaints: list[str]
    """Empty: believe it."""


def judge(healths: Sequence[Health], outcomes: Sequence[Outcome], limits: Limits) -> Verdict:
    lags = [percentile(each.lags_s, 99) * 1000 for each in healths]
    slips = [each.sent_s - each.due_s for each in outcomes]
    slip_ms = percentile(slips, 99) * 1000
    share = max((each.cpu_s / each.wall_s for each in healths if each.wall_s >= SHORTEST_S), default=0.0)
    lag_ms = max(lags, default=0.0)
    complaints = []
    if lag_ms > limits.lag_ms:
        complaints.append(
            f"its event loop woke {lag_ms:.1f} ms late (p99; at most {limits.lag_ms:g} ms, --max-lag-ms)"
        )
    if slip_ms > limits.slip_ms:
        complaints.append(
            f"requests were sent {slip_ms:.1f} ms later than planned "
            f"(p99; at most {limits.slip_ms:g} ms, --max-slip-ms)"
        )
    if share > limits.cpu_share:
        complaints.append(
            f"a process of it used {share:.0%} of a core (at most {limits.cpu_share:.0%}; --processes)"
        )
    return Verdict(
        lag_ms,
        max((max(each.lags_s, default=0.0) for each in healths), default=0.0) * 1000,
        slip_ms,
        max(slips, default=0.0) * 1000,
        share,
        len(healths),
        complaints,
    )
