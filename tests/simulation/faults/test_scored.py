"""Log-probabilities of prompts come whole and once in a mesh with faults, as the oracle's."""

from __future__ import annotations

import pytest

from microserve.services.simulation.faults.campaign import run_seed
from microserve.services.simulation.faults.scenario import draw
from microserve.services.simulation.faults.scored import scored

SEEDS = 60


@pytest.mark.slow
def test_every_promise_holds_in_worlds_whose_prompts_are_scored() -> None:
    broken = {}
    num_complete = num_continued = 0
    for seed in range(SEEDS):
        verdict = run_seed(seed, scenario=scored(draw(seed)))
        num_complete += verdict.outcomes["length"] + verdict.outcomes["stop"]
        num_continued += verdict.events["request.continued"]
        if verdict.violations:
            broken[seed] = verdict.violations[:3]
    assert broken == {}
    assert num_complete > 100 and num_continued > 10


def test_some_ask_and_some_of_those_want_the_prompt_alone() -> None:
    arrivals = [each for seed in range(20) for each in scored(draw(seed)).arrivals]

    assert {each.params.prompt_logprobs for each in arrivals} == {None, 0, 2}
    assert {each.params.prompt_logprobs is None for each in arrivals if not each.params.max_tokens} == {False}
