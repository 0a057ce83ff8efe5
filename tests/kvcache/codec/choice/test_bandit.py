"""A codec that becomes slow where it runs is left in time, and taken again when it is as it was."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from microserve.kvcache.codec.choice.controller import Controller, Tuning
from microserve.kvcache.codec.choice.decision import Context, Decision, Reason
from microserve.kvcache.codec.library import RAW, Library, Measured
from tests.support.kvcache.codec_libraries import CODECS, lossless, lossy, seconds

MB = 1_000_000
RATE = 20.0 * MB
NBYTES = 16 * MB
INCUMBENT = lossy("incumbent", 8.0, 200 * MB, 200 * MB)
"""0.26 s at that rate; raw takes 0.8 s."""
FAR, CLOSE = lossy("runner-up", 2.0, 400 * MB, 400 * MB), lossy("runner-up", 3.6, 300 * MB, 300 * MB)
"""0.48 s and 0.33 s."""
SLOWDOWN = 4.0
WITHOUT_BANDIT = Tuning(explore=0.0, wander=0.0, weight=0.0)


def _context(nbytes: int = NBYTES, **fields: object) -> Context:
    return Context(nbytes, 1, RATE, may_lose=True, codecs=CODECS, **fields)  # type: ignore[arg-type]


def _took(measured: Measured, nbytes: int = NBYTES, *, slow: bool = False) -> float:
    """In truth: ``slow`` has the incumbent's codec take four times as long."""
    plain = seconds(measured, nbytes, 1, RATE)
    codec = plain - nbytes / measured.ratio / RATE
    return plain + (SLOWDOWN - 1.0) * codec * (slow and measured is INCUMBENT)


def _uses_until_it_is_left(controller: Controller, runner_up: Measured) -> int:
    """Of the incumbent, once it is slow."""
    by_name = {each.profile.name: each for each in (RAW, INCUMBENT, runner_up)}
    uses = 0
    for _ in range(100):
        decision = controller.select(_context())
        if decision.reason is not Reason.EXPLORED and decision.profile != INCUMBENT.profile:
            assert decision.profile == runner_up.profile
            return uses
        uses += decision.profile == INCUMBENT.profile
        controller.observe(decision, _took(by_name[decision.profile.name], slow=True))
    raise AssertionError("it is used for ever")


@pytest.mark.parametrize("runner_up", [FAR, CLOSE])
@pytest.mark.parametrize("weight", [0.05, 0.1, 0.2, 0.3])
@pytest.mark.parametrize("wander", [0.0, 0.02])
def test_the_incumbent_is_left_when_the_mean_has_passed_the_gap(
    runner_up: Measured, weight: float, wander: float
) -> None:
    """n uses bring the mean to d * (1 - (1-a)^n), and it must exceed the gap D."""
    controller = Controller(
        Library(entries=[INCUMBENT, runner_up]), tuning=Tuning(weight=weight, wander=wander), seed=5
    )
    gap = _took(runner_up) / _took(INCUMBENT) - 1.0
    residual = _took(INCUMBENT, slow=True) / _took(INCUMBENT) - 1.0
    least = math.log(1.0 - gap / residual) / math.log(1.0 - weight)
    uses = _uses_until_it_is_left(controller, runner_up)
    assert least <= uses <= math.ceil(least) + 1


def _trace(seed: int) -> list[tuple[int, bool, float]]:
    """(bytes, is the incumbent slow, noise) of 700 transfers: 100 are well, 300 slow, 300 well again."""
    source = random.Random(seed)
    return [
        (int(10 ** source.uniform(6.5, 8)), 100 <= number < 400, math.exp(source.gauss(0.0, 0.05)))
        for number in range(700)
    ]


def _replay(
    tuning: Tuning, seed: int, runner_up: Measured, seen: Callable[[int, Decision], None] = lambda _, __: None
) -> float:
    """Regret against who knows the true times, per transfer, in seconds."""
    controller = Controller(Library(entries=[INCUMBENT, runner_up]), tuning=tuning, seed=seed)
    by_name = {each.profile.name: each for each in (RAW, INCUMBENT, runner_up)}
    regret = 0.0
    for number, (nbytes, slow, noise) in enumerate(_trace(seed)):
        decision = controller.select(_context(nbytes))
        took = {name: _took(each, nbytes, slow=slow) * noise for name, each in by_name.items()}
        observed = took[decision.profile.name]
        regret += observed - min(took.values())
        seen(number, decision)
        controller.observe(decision, observed)
        controller.check_integrity()
    return regret


@pytest.mark.parametrize("runner_up", [FAR, CLOSE])
@pytest.mark.parametrize("seed", range(5))
def test_regret_is_at_most_half_of_what_it_is_without_the_bandit(seed: int, runner_up: Measured) -> None:
    assert _replay(Tuning(), seed, runner_up) <= 0.5 * _replay(WITHOUT_BANDIT, seed, runner_up)


def _use_at_the_end(tuning: Tuning, seed: int) -> float:
    """Share of the incumbent in the last 150 transfers, long after it has recovered."""
    names: list[str] = []
    _replay(tuning, seed, FAR, lambda _, decision: names.append(decision.profile.name))
    return names[-150:].count(INCUMBENT.profile.name) / 150


@pytest.mark.parametrize("seed", range(5))
def test_it_is_taken_again_when_it_has_recovered(seed: int) -> None:
    assert _use_at_the_end(Tuning(), seed) > 0.9


@pytest.mark.parametrize("seed", range(2))
def test_without_exploring_it_is_never_taken_again(seed: int) -> None:
    assert _use_at_the_end(Tuning(explore=0.0, wander=0.0), seed) == 0.0


def test_what_is_learned_of_small_transfers_holds_for_large_ones() -> None:
    """Residuals are relative: the same slow-down is the same number whatever the volume."""
    controller = Controller(Library(entries=[INCUMBENT, FAR]), tuning=Tuning(explore=0.0, wander=0.0))
    for _ in range(10):
        decision = controller.select(_context(MB))
        controller.observe(
            decision, _took(INCUMBENT if "inc" in decision.profile.name else FAR, MB, slow=True)
        )
    decision = controller.select(_context(1000 * MB))
    assert (decision.profile.name, decision.reason) == ("runner-up", Reason.LEARNED)


def test_one_transfer_that_hung_is_lived_down() -> None:
    controller = Controller(Library(entries=[INCUMBENT, FAR]), seed=1)
    controller.observe(controller.select(_context()), 1e6)
    used = 0
    for _ in range(400):
        decision = controller.select(_context())
        used += decision.profile == INCUMBENT.profile
        controller.observe(decision, decision.predicted_s)
        controller.check_integrity()
    assert used > 200


def test_the_same_seed_decides_the_same() -> None:
    def decisions(seed: int) -> list[str]:
        names: list[str] = []
        _replay(Tuning(explore=0.3, wander=0.3), seed, CLOSE, lambda _, each: names.append(each.profile.name))
        return names

    assert decisions(4) == decisions(4)


def test_exploring_costs_less_than_two_percent_where_all_is_as_predicted() -> None:
    library = Library(entries=[INCUMBENT, CLOSE, lossless("lossless", 1.3, 500 * MB)])
    controller = Controller(library, seed=3)
    spent = least = 0.0
    for _ in range(2000):
        decision = controller.select(_context())
        spent += decision.predicted_s
        least += _took(INCUMBENT)
        controller.observe(decision, decision.predicted_s)
    assert spent < 1.02 * least
