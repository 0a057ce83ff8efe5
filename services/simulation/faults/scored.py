"""A scenario whose requests ask for log-probabilities of their prompts: the same mesh, arrivals and faults
otherwise.

Of lots of its own, so that what all other seeds mean does not change.
"""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec

from microserve.services.simulation.faults.scenario import Arrival, Scenario

SHARE = 0.6
"""Of the requests; the others share steps and caches with them."""
SHARE_OF_PROMPTS_ALONE = 0.3
"""Of those: nothing is generated."""


def scored(scenario: Scenario) -> Scenario:
    rng = random.Random(f"scored {scenario.seed}")

    def with_rows(arrival: Arrival) -> Arrival:
        if rng.random() >= SHARE:
            return arrival
        params = msgspec.structs.replace(arrival.params, prompt_logprobs=rng.choice((0, 2)))
        if rng.random() < SHARE_OF_PROMPTS_ALONE:
            params = msgspec.structs.replace(params, max_tokens=0)
        return replace(arrival, params=params)

    return replace(
        scenario,
        arrivals=[with_rows(each) for each in scenario.arrivals],
        crowd=[with_rows(each) for each in scenario.crowd],
    )
