"""A scenario whose engines send KV by a codec where a strategy splits: the same mesh, arrivals and faults
otherwise."""

from __future__ import annotations

from dataclasses import replace

from microserve.services.simulation.faults.scenario import Scenario
from microserve.services.simulation.mesh import WITH_CODEC


def coded(scenario: Scenario) -> Scenario:
    """Every second request goes under a strategy that has one; all engines are of one class."""
    strategies = (*WITH_CODEC, "prfaas")
    arrivals = [
        replace(each, strategy=strategies[number // 2 % len(strategies)]) if number % 2 else each
        for number, each in enumerate(scenario.arrivals)
    ]
    shape = replace(scenario.shape, codec="lossless-zstd", numerics=())
    return replace(scenario, shape=shape, arrivals=arrivals)
