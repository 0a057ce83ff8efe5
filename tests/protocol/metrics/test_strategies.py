"""Metrics by strategy: what a router says of the end is counted under bounded labels."""

from __future__ import annotations

from typing import Any

import msgspec

from microserve.protocol.messages.engine import Usage
from microserve.protocol.messages.router import Ended, Phases
from microserve.protocol.metrics.readings import Readings
from microserve.protocol.metrics.strategies import (
    MAX_ENGINES,
    MAX_RESULTS,
    MAX_VERSIONS,
    OTHER,
    StrategyAccount,
)
from microserve.protocol.metrics.table.gateway import BY_STRATEGY
from microserve.protocol.metrics.text import metrics_of


def ended(**fields: Any) -> Ended:
    usage = Usage(prompt_tokens=40, cached_tokens=16, received_tokens=8, output_tokens=5)
    phases = Phases(total_s=0.5, decoded_s=0.4)
    whole = Ended("length", usage, phases, "mine", ["e0", "e1"], strategy_version=3, share="canary")
    return msgspec.structs.replace(whole, **fields)


def samples(metrics: StrategyAccount) -> dict[tuple[str, ...], float]:
    readings = Readings()
    metrics.read(readings)
    return {
        (sample.name.removeprefix("microserve_strategy_"), *sample.labels.values()): sample.value
        for family in metrics_of(readings)
        for sample in family.samples
    }


def test_an_end_is_counted_by_strategy_version_and_share() -> None:
    metrics = StrategyAccount(BY_STRATEGY)
    metrics.ended(ended(num_moves=2))
    metrics.ended(ended(reason="error", code="queue_full"))
    metrics.ended(ended(reason="abort"))
    metrics.ended(ended(share=""))
    found, labels = samples(metrics), ("mine", "3", "canary")
    assert {key[-1]: value for key, value in found.items() if key[0] == "requests_total"} == {
        "length": 1,
        "queue_full": 1,
        "abort": 1,
    }
    assert found["moves_total", *labels] == 2
    assert found["cached_tokens_total", *labels] == 48
    assert found["engine_requests_total", "mine", "3", "e1"] == 3
    for name, seconds in (
        ("time_to_first_token", 0.1),
        ("time_per_output_token", 0.1),
        ("job_completion", 0.5),
    ):
        assert found[f"{name}_seconds_count", *labels] == 1
        assert abs(found[f"{name}_seconds_sum", *labels] - seconds) < 1e-9


def test_there_are_never_more_series_than_their_bound() -> None:
    metrics = StrategyAccount(BY_STRATEGY)
    for number in range(3 * MAX_VERSIONS):
        metrics.ended(ended(strategy_version=number, engines=[f"e{number}"]))
        metrics.ended(ended(strategy_version=10**6))
    for number in range(2 * MAX_ENGINES):
        metrics.ended(
            ended(strategy_version=10**6, engines=[f"x{number}"], reason="error", code=f"c{number}")
        )
    found = samples(metrics)
    assert len([key for key in found if key[0] == "moves_total"]) == MAX_VERSIONS
    assert len([key for key in found if key[0] == "engine_requests_total"]) == MAX_ENGINES
    kept = [key for key in found if key[:2] == ("requests_total", "mine") and key[2] == "1000000"]
    assert len(kept) == MAX_RESULTS + 1
    assert (*kept[0][:-1], OTHER) in found
