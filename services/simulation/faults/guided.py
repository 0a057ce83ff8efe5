"""A scenario whose requests have grammars: the same mesh, arrivals and faults otherwise.

Of lots of its own, so that what all other seeds mean does not change.
"""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec

from microserve.protocol.messages.request.sampling import Grammar
from microserve.services.simulation.faults.scenario import Arrival, Scenario

TEXTS = ("a", "bb", "ccc", "dddd")
SHARE = 0.7
"""Of the requests; the others share steps with them."""


def guided(scenario: Scenario) -> Scenario:
    rng = random.Random(f"guided {scenario.seed}")

    def with_grammar(arrival: Arrival) -> Arrival:
        grammar = Grammar(kind="regex", text=rng.choice(TEXTS)) if rng.random() < SHARE else None
        return replace(arrival, params=msgspec.structs.replace(arrival.params, grammar=grammar))

    return replace(
        scenario,
        arrivals=[with_grammar(each) for each in scenario.arrivals],
        crowd=[with_grammar(each) for each in scenario.crowd],
    )
