"""Worlds in which processes also run out of descriptors: a scenario of its seed, and more faults by lots of
their own.

Apart from what a seed draws, so that no seed means another world than before.
"""

from __future__ import annotations

import dataclasses
import random

from microserve.services.simulation.faults.fates import Fault
from microserve.services.simulation.faults.scenario import Scenario

MAX_FAULTS = 4
MAX_EXHAUSTED_S = 3.0


def with_exhaustion(scenario: Scenario) -> Scenario:
    """The same world, in which some processes open nothing for a while."""
    rng = random.Random(f"exhaustion {scenario.seed}")
    shape, last = scenario.shape, max(arrival.at for arrival in scenario.arrivals)
    names = ["index"]
    names += [f"engine-{number}" for number in range(shape.num_engines)]
    names += [f"router-{number}" for number in range(shape.num_routers)]
    names += [f"gateway-{number}" for number in range(shape.num_gateways)]
    faults = []
    for _ in range(rng.randint(1, MAX_FAULTS)):
        at = rng.uniform(0.5, last)
        until = min(at + rng.uniform(0.2, MAX_EXHAUSTED_S), scenario.ends_at)
        faults.append(Fault(at, until, "exhaust", rng.choice(names)))
    together = sorted([*scenario.faults, *faults], key=lambda fault: fault.at)
    return dataclasses.replace(scenario, kind="storm", faults=together)
