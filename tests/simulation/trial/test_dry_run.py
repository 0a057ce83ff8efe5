"""The check before publishing: hostile strategies are refused and told why, good ones pass."""

from __future__ import annotations

import inspect
import sys

import pytest

from microserve.services.router.authoring.definition import Strategy
from microserve.services.router.strategies import BUILT_IN
from microserve.services.simulation.trial.dry_run import try_strategy
from tests.support.router.hostile_strategies import GOOD, HEAD, HOSTILE, SERVE


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_strategy_is_refused_and_told_why(name: str) -> None:
    source, says = HOSTILE[name]
    trial = try_strategy("mine", source, {}, [[], []])
    assert any(says in each.text for each in trial.found), trial.found


@pytest.mark.parametrize("strategy", BUILT_IN, ids=lambda strategy: strategy.name)
def test_the_strategies_that_are_shipped_pass_when_they_are_published(strategy: Strategy) -> None:
    source = inspect.getsource(sys.modules[strategy.function.__module__])
    trial = try_strategy(strategy.name, source, {}, [["prefill"], ["decode"], ["decode"]])
    assert trial.found == []
    assert trial.request_s > 0


STREAM = "async for tokens in engine.start_generate(request):\n"
HARD = {
    "a prompt that is long": (
        "    if request.num_tokens > 1000: raise ValueError('too long for me')\n" + SERVE,
        "ValueError: too long for me, with prompts of up to 8192 tokens: ",
    ),
    "an engine that is slow": (
        "    async with asyncio.timeout(0.6 if request.num_tokens < 1000 else 60):\n"
        "        engine = mesh.engines()[-1]\n"
        f"        {STREAM}            yield tokens\n",
        "TimeoutError, while an engine was ten times slower than the others",
    ),
    "an engine that is lost": (
        f"    [engine, other] = mesh.engines()\n    {STREAM}        yield tokens\n",
        ", while an engine was lost: engines come and go",
    ),
    "an engine that is lost, and asked again": (
        f"    engine = mesh.engines()[-1]\n    try:\n        {STREAM}            yield tokens\n"
        f"    except Exception:\n        {STREAM}            yield tokens\n",
        ", while an engine was lost",
    ),
}


@pytest.mark.parametrize("name", HARD)
def test_what_only_shows_where_it_is_hard_shows(name: str) -> None:
    body, says = HARD[name]
    trial = try_strategy("mine", HEAD + body, {}, [[], []])
    assert any(says in each.text and each.line for each in trial.found), trial.found


def test_an_empty_mesh_is_tried_as_one_engine() -> None:
    assert try_strategy("mine", GOOD, {"ratio": 0.5}, []).found == []
