"""What a router counts for its metrics, and that names which strategies make up have an end."""

from __future__ import annotations

from typing import Any

import msgspec

from microserve.protocol.messages.engine import Usage
from microserve.protocol.messages.router import Ended, Phases
from microserve.protocol.metrics.family import Family
from microserve.protocol.metrics.histogram import Histogram
from microserve.protocol.metrics.readings import Readings
from microserve.protocol.metrics.table import router as table
from microserve.services.router.request.decision import Decision
from microserve.services.router.request.trail import Trail
from microserve.services.router.serving.tally import MAX_PICKS, MAX_STRATEGIES, RouterTally


def ended(**fields: Any) -> Ended:
    phases = Phases(total_s=1.0, routed_s=0.1, prefilled_s=0.3, first_token_s=0.1, decoded_s=0.5)
    whole = Ended("length", Usage(prompt_tokens=40, output_tokens=5), phases, "mine", ["e0"], share="stable")
    return msgspec.structs.replace(whole, **fields)


def trail(strategy: str, label: str | None, reason: str) -> Trail:
    made = Trail(strategy, 0, 40, Decision(), 0.0, 0.0)
    made.choose(label, reason, 0.0, ["e0"], [0.0], [], "e0", (), "", (), 0.0)
    return made


def series(tally: RouterTally, family: Family) -> dict[tuple[str, ...], Any]:
    readings = Readings()
    tally.read(readings)
    return {labels: value for each, found in readings if each is family for labels, value in found}


def test_ends_are_counted_with_what_led_to_them() -> None:
    tally = RouterTally()
    tally.failovers["engine_lost"] += 1
    trails = [trail("mine", "decode", "load"), trail("move", None, "prefix")]
    tally.ended(ended(alone="grants_full"), trails, failed=True, slow=True)
    tally.ended(ended(reason="error", code="queue_full", share=""))
    assert series(tally, table.FAILOVERS) == {("engine_lost",): 1}
    assert series(tally, table.PICKS) == {("mine", "decode", "load"): 1, ("move", "any", "prefix"): 1}
    assert series(tally, table.REFUSED) == {("queue_full",): 1}
    assert series(tally, table.ALONE) == {("grants_full",): 1}
    assert series(tally, table.MISTAKES)["mine",] == series(tally, table.SLOW)["mine",] == 1
    phases = series(tally, table.PHASES)
    parts = [value for (name, _), value in phases.items() if name == "mine"]
    assert all(isinstance(each, Histogram) and sum(each.counts) == 1 for each in parts)
    assert abs(sum(each.total for each in parts) - 1.0) < 1e-9
    assert series(tally, table.BY_STRATEGY.requests) == {("mine", "0", "stable", "length"): 1}


def test_there_are_never_more_series_than_their_bound() -> None:
    tally = RouterTally()
    for number in range(2 * MAX_PICKS):
        tally.ended(ended(strategy=f"s{number}"), [trail("s0", f"label{number}", "load")])
    assert len(series(tally, table.PICKS)) <= MAX_PICKS + 1
    assert len({name for name, _ in series(tally, table.PHASES)}) <= MAX_STRATEGIES + 1
