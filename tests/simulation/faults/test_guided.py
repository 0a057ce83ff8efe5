"""Requests with grammars keep every promise of a mesh with faults: whole answers are the oracle's."""

from __future__ import annotations

import pytest

from microserve.services.simulation.faults.campaign import run_seed
from microserve.services.simulation.faults.guided import guided
from microserve.services.simulation.faults.judge import expected
from microserve.services.simulation.faults.scenario import draw

SEEDS = 60


@pytest.mark.slow
def test_every_promise_holds_in_worlds_with_grammars() -> None:
    broken = {}
    num_complete = num_continued = 0
    for seed in range(SEEDS):
        verdict = run_seed(seed, scenario=guided(draw(seed)))
        num_complete += verdict.outcomes["length"] + verdict.outcomes["stop"]
        num_continued += verdict.events["request.continued"]
        if verdict.violations:
            broken[seed] = verdict.violations[:3]
    assert broken == {}
    assert num_complete > 100 and num_continued > 10


def test_a_grammar_makes_another_answer() -> None:
    plain = draw(3).arrivals[0]
    texts = {
        each.params.grammar and each.params.grammar.text
        for s in range(20)
        for each in guided(draw(s)).arrivals
    }
    assert texts == {None, "a", "bb", "ccc", "dddd"}
    params = next(
        each.params
        for s in range(20)
        for each in guided(draw(s)).arrivals
        if each.params.grammar and each.params.max_tokens > 4 and not each.params.stop_token_ids
    )
    assert expected(plain.prompt, params) != expected(plain.prompt, plain.params)
