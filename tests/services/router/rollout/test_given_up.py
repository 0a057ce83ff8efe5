"""When a version is given up in a router, what is not held against it, and what a trial beside it counts."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from microserve.protocol.messages.engine import Usage
from microserve.protocol.messages.router import Ended, Phases
from microserve.protocol.messages.strategy.control import ControlEntry, StrategyVersion
from microserve.services.router.rollout.window import MIN_ERRORS, MIN_TIMED
from tests.support.router.control_world import PLAIN, make, serving, state, version


def test_a_version_over_its_publishers_own_bounds_is_given_up() -> None:
    _, control, _ = make()
    bounded = StrategyVersion(1, PLAIN, "d", {}, max_ttft_s=0.5)
    control.apply(state(1, ControlEntry("mine", bounded)))
    slow = Ended("length", Usage(output_tokens=1), Phases(total_s=2.0), "mine", [], strategy_version=1)
    for _ in range(MIN_TIMED):
        control.ended(slow, False, False)
    [fault] = control.faults
    assert "the bound is 0.5 s" in fault.reason


def ended(version: int, ttft_s: float = 0.1, name: str = "mine", **fields: Any) -> Ended:
    phases = Phases(total_s=ttft_s + 0.4, decoded_s=0.4)
    return Ended(
        "length", Usage(40, output_tokens=5), phases, name, ["e1"], strategy_version=version, **fields
    )


@pytest.mark.parametrize("bound_s", [0.1, 0.0])
def test_a_canary_of_a_tenth_at_four_requests_a_second_is_given_up_when_it_is_slow(bound_s: float) -> None:
    """Five times over its bound, or five times as slow as the version beside it: in a minute and a half."""
    book, control, clock = make()
    slow = msgspec.structs.replace(version(2), max_ttft_s=bound_s)
    control.apply(state(2, ControlEntry("mine", version(1), slow, 0.1)))
    began = clock.now
    for number in range(2000):
        clock.now += 0.25
        chosen = book.get("mine", f"r{number}").version
        control.ended(ended(chosen, 0.5 if chosen == 2 else 0.1), False, False)
        if control.faults:
            break
    assert [(fault.strategy, fault.version) for fault in control.faults] == [("mine", 2)]
    assert clock.now - began < 90.0


def test_nobody_is_blamed_for_the_time_in_which_a_router_did_not_run() -> None:
    """Stopped for a minute, it finds every live request late by as much."""
    _, control, clock = make()
    bounded = msgspec.structs.replace(version(1), max_ttft_s=0.5)
    control.apply(state(1, ControlEntry("mine", bounded)))
    for _ in range(40):
        control.beat(1.0)
        clock.now += 1.0
        control.ended(ended(1), False, False)
    clock.now += 60.0
    for _ in range(40):
        control.ended(ended(1, 60.0), False, False)
    assert control.faults == []
    for _ in range(MIN_TIMED):
        control.beat(1.0)
        clock.now += 1.0
        control.ended(ended(1, 0.6), False, False)
    assert control.faults, "what began since then counts"


def test_a_trial_has_what_came_while_two_versions_stood_beside_each_other() -> None:
    _, control, clock = make()
    control.apply(state(2, ControlEntry("mine", version(1), version(2), 0.25)))
    control.ended(ended(1), False, False)  # it came before
    clock.now += 10.0
    for number in (1, 1, 2, 7):
        control.ended(ended(number), False, False)
    control.ended(ended(2), True, False)
    [trial] = control.trials.told(clock.now)
    assert (trial.stable_version, trial.canary_version, trial.share, trial.seconds) == (1, 2, 0.25, 10.0)
    assert (trial.stable.num_requests, trial.stable.num_failed) == (2, 0)
    assert (trial.canary.num_requests, trial.canary.num_failed, trial.canary.ttft[0]) == (2, 1, 1.0)
    control.apply(state(3, ControlEntry("mine", version(1), version(2), 0.25), ControlEntry("other")))
    assert control.trials.told(clock.now) == [trial], "nothing of it has changed"
    control.apply(state(4, ControlEntry("mine", version(1), version(2), 0.5)))
    [fresh] = control.trials.told(clock.now)
    assert (fresh.share, fresh.canary.num_requests) == (0.5, 0)
    control.apply(state(5, ControlEntry("mine", version(2))))
    assert control.trials.told(clock.now) == []


def test_a_fault_is_told_even_when_its_version_is_gone() -> None:
    _, control, clock = make()
    control.apply(serving(1))
    failed = Ended("length", Usage(), Phases(), "mine", [], strategy_version=1)
    for _ in range(MIN_ERRORS + 2):
        control.ended(failed, True, False)
        clock.now += 0.1
    [fault] = control.faults
    assert (fault.strategy, fault.version) == ("mine", 1)
    control.apply(state(2, ControlEntry("mine", version(1)), ControlEntry("other", version(2))))
    assert control.faults == [fault]
    control.apply(state(3, ControlEntry("mine")))
    assert control.faults == [fault], "or the next rollback might restore it"


def test_what_ends_late_counts_against_its_own_version() -> None:
    _, control, _ = make()
    control.apply(serving(1))
    failed = Ended("length", Usage(), Phases(), "mine", [], strategy_version=1)
    control.ended(failed, True, False)
    control.apply(state(2, ControlEntry("mine", version(2))))
    for _ in range(MIN_ERRORS):
        control.ended(failed, True, False)
    assert [(fault.strategy, fault.version) for fault in control.faults] == [("mine", 1)]
    never = Ended("length", Usage(), Phases(), "mine", [], strategy_version=7)
    for _ in range(MIN_ERRORS + 1):
        control.ended(never, True, False)
    assert len(control.faults) == 1, "what never was in force here"


def test_a_version_that_hangs_when_another_is_in_force_is_told_and_does_not_serve_again() -> None:
    book, control, _ = make()
    control.apply(serving(1))
    control.apply(state(2, ControlEntry("mine", version(2))))
    control.hung("mine", 1, "it hangs")
    assert [(fault.strategy, fault.version) for fault in control.faults] == [("mine", 1)]
    [mine] = [each for each in book.serves() if each.strategy == "mine"]
    assert (mine.version, mine.suspended) == (2, [1])
    control.apply(state(3, ControlEntry("mine", version(1))))
    assert book.get("mine", "x").version == 0, "plain service"
    assert [(fault.strategy, fault.version) for fault in control.faults] == [("mine", 1)]
