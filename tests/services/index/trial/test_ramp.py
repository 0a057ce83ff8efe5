"""Ramps: when a canary gets its next share, and that no clock, silence or restart brings one forward."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.protocol.messages.engine import Usage
from microserve.protocol.messages.strategy.control import (
    PROMOTE,
    RAMP,
    ROLLBACK,
    SHARE,
    Change,
    RouterControl,
)
from microserve.protocol.messages.strategy.scores import Ramp, Side, Trial
from microserve.services.index.control_state import Fold
from microserve.services.index.trial.ramp import MAX_LOOK_S, Ramps
from microserve.services.router.rollout.sums import Sums, Timing
from tests.support.examples import examples

SHARES = [0.01, 0.1, 0.5, 1.0]
EVERY_S, MIN_REQUESTS = 60.0, 20


class Mesh:
    """An index's fold, and routers that do what it says."""

    def __init__(self, ramp: Ramp, num_routers: int = 2) -> None:
        self.fold = Fold()
        self.ramps = Ramps()
        self.now = 1000.0
        self.log: list[Change] = []
        self.is_late = False
        self.ttft_s = {"stable": 0.1, "canary": 0.1}
        self.num_failing = 0
        self._rng = random.Random(1)
        self._sums: dict[str, Sums] = {}
        self._num_routers = num_routers
        self.change(Change(1, "a", "publish", "mine", source="old"))
        self.change(Change(1, "b", "publish", "mine", source="new", share=SHARES[0], ramp=ramp))

    def change(self, change: Change) -> None:
        self.fold = self.fold.after(change, self.fold.version + 1)
        self.log.append(change)
        self._sums = {"stable": Sums(), "canary": Sums()}

    @property
    def share(self) -> float:
        """The canary's, 1 when it has been promoted, 0 when it was taken back."""
        rollout = self.fold.rollouts["mine"]
        if rollout.canary is not None:
            return rollout.share
        assert rollout.stable is not None
        return 1.0 if rollout.stable.source == "new" else 0.0

    def serve(self, count: int) -> None:
        """So many requests of each."""
        for name, sums in self._sums.items():
            for _ in range(count):
                log_s = math.log(self.ttft_s[name]) + self._rng.gauss(0.0, 0.2)
                sums.add(False, Timing(log_s, log_s, log_s), 7, Usage(9, output_tokens=1))

    def fail(self, count: int) -> None:
        """So many of the canary's."""
        for _ in range(count):
            self._sums["canary"].add(True, Timing(), 0, Usage())

    def look(self, passed_s: float = 1.0) -> list[Change]:
        self.now += passed_s
        made = self.ramps.look(self.fold, self.routers(), self.now)
        for change in made:
            self.change(change)
        return made

    def routers(self) -> list[RouterControl]:
        rollout = self.fold.rollouts["mine"]
        version = self.fold.version - self.is_late
        trials = []
        if rollout.canary is not None and rollout.stable is not None:
            sides = (self._sums["stable"].told(), self._sums["canary"].told())
            trials = [Trial("mine", rollout.stable.version, rollout.canary.version, rollout.share, False,
                            1.0, *sides)]  # fmt: skip
        silent = [RouterControl(f"r{number}", version, []) for number in range(1, self._num_routers)]
        return [RouterControl("r0", version, [], trials=trials), *silent] if self._num_routers else []

    def pass_time(self, seconds: float) -> list[Change]:
        return [change for _ in range(round(seconds)) for change in self.look()]


def mesh(**fields: object) -> Mesh:
    given = {"shares": SHARES, "every_s": EVERY_S, "min_requests": MIN_REQUESTS} | fields
    return Mesh(Ramp(**given))  # type: ignore[arg-type]


def test_a_canary_that_is_well_goes_up_share_by_share_and_is_promoted() -> None:
    world = mesh()
    seen = [world.share]
    for _ in range(3):
        world.serve(MIN_REQUESTS)
        assert world.pass_time(EVERY_S - 2) == [], "not before its time"
        [change] = world.pass_time(3)
        assert "20 requests" in change.reason
        seen.append(world.share)
    assert seen == SHARES
    assert [change.kind for change in world.log[2:]] == [SHARE, SHARE, PROMOTE]
    assert world.look() == []
    assert world.fold.rollouts["mine"].ramp is None


def test_time_alone_brings_nothing_that_nobody_has_asked_for() -> None:
    world = mesh()
    world.serve(MIN_REQUESTS - 1)
    assert world.pass_time(10 * EVERY_S) == []
    [state] = world.ramps.states(world.fold)
    assert (state.next_share, state.num_requests, state.waits_for) == (0.1, 19, "1 requests more")
    world.serve(1)
    assert [change.kind for change in world.look()] == [SHARE]


def test_a_router_that_has_connected_anew_counts_once() -> None:
    world = mesh()
    world.serve(MIN_REQUESTS // 2)
    before = [RouterControl("r0", 0, [], trials=world.routers()[0].trials)]
    world.serve(MIN_REQUESTS // 2 - 1)
    for _ in range(10 * round(EVERY_S)):
        world.now += 1.0
        assert world.ramps.look(world.fold, [*before, *world.routers()], world.now) == []
    [state] = world.ramps.states(world.fold)
    assert (state.num_requests, state.waits_for) == (MIN_REQUESTS - 1, "1 requests more")


@pytest.mark.parametrize(("kind", "says"), [("slow", "TTFT"), ("failing", "failures")])
def test_one_that_is_seen_to_be_worse_is_taken_back_even_when_it_is_paused(kind: str, says: str) -> None:
    world = mesh(paused=True)
    if kind == "slow":
        world.ttft_s["canary"] = 0.15
        world.serve(150)
    else:
        world.serve(100)
        world.fail(30)
    [change] = world.look()
    assert change.kind == ROLLBACK
    assert says in change.reason
    assert world.share == 0.0


def test_a_paused_one_waits_and_goes_on_with_what_it_had() -> None:
    world = mesh()
    world.serve(MIN_REQUESTS)
    world.pass_time(EVERY_S - 10)
    ramp = world.fold.rollouts["mine"].ramp
    assert ramp is not None
    for paused in (True, False):
        again = Ramp(ramp.shares, ramp.every_s, ramp.min_requests, paused=paused)
        sums = world._sums
        world.change(Change(1, f"p{paused}", RAMP, "mine", ramp=again))
        world._sums = sums  # neither versions nor shares have changed
        assert world.pass_time(5) == []
        if paused:
            assert world.pass_time(500) == []
    assert world.pass_time(10), "fifty seconds before, and these"


@pytest.mark.parametrize("until", ["better", "not_worse"])
def test_one_that_waits_for_a_result_waits_for_it(until: str) -> None:
    world = mesh(shares=[1.0], every_s=0.0, until=until)
    world.ttft_s["canary"] = 0.1 if until == "better" else 0.104
    world.serve(25)
    assert world.pass_time(100) == []
    assert "seen" in world.ramps.states(world.fold)[0].waits_for
    world.ttft_s["canary"] = 0.07 if until == "better" else 0.1
    world.serve(400)
    assert [change.kind for change in world.look()] == [PROMOTE]


def test_nothing_goes_on_while_a_router_lags_or_there_is_none() -> None:
    world = mesh()
    world.serve(MIN_REQUESTS)
    world.is_late = True
    assert world.pass_time(5 * EVERY_S) == []
    world.is_late = False
    assert world.pass_time(EVERY_S - 2) == [], "that time did not count"
    assert world.pass_time(3)
    nobody = Mesh(Ramp(SHARES, EVERY_S), num_routers=0)
    assert nobody.pass_time(5 * EVERY_S) == []
    assert nobody.ramps.states(nobody.fold)[0].waits_for == "no router watches"


def test_a_restarted_index_begins_the_share_anew() -> None:
    world = mesh()
    world.serve(MIN_REQUESTS)
    world.pass_time(EVERY_S - 5)
    world.ramps = Ramps()
    assert world.pass_time(EVERY_S - 2) == []
    assert world.pass_time(3)


STEP = st.one_of(
    st.tuples(st.just("look"), st.floats(-1e6, 1e6) | st.floats(0.0, 20.0)),
    st.tuples(st.sampled_from(["serve", "fail"]), st.integers(0, 12)),
    st.tuples(st.sampled_from(["late", "restart", "pause", "resume"]), st.just(0)),
)


@settings(max_examples=examples(80), deadline=None)
@given(st.lists(STEP, max_size=80))
def test_no_clock_and_no_trouble_brings_a_canary_forward_or_back(steps: list[tuple[str, float]]) -> None:
    """Shares only ascend, each after its time in small looks and its requests; only failures take it back."""
    world = mesh()
    well_s, num_requests, num_failed = 0.0, 0, 0
    shares = [world.share]
    for number, (what, amount) in enumerate(steps):
        rollout = world.fold.rollouts["mine"]
        if rollout.canary is None:
            break
        if what == "look":
            is_paused = rollout.ramp is not None and rollout.ramp.paused
            if not (world.is_late or is_paused):
                well_s += min(max(amount, 0.0), MAX_LOOK_S)
            for change in world.look(amount):
                if change.kind == ROLLBACK:
                    assert num_failed >= 3
                    return
                assert well_s >= EVERY_S - 1e-6
                assert num_requests >= MIN_REQUESTS
                shares.append(world.share)
                well_s, num_requests = 0.0, 0
        elif what == "serve":
            world.serve(int(amount))
            num_requests += int(amount)
        elif what == "fail":
            world.fail(int(amount))
            num_requests += int(amount)
            num_failed += int(amount)
        elif what == "late":
            world.is_late = not world.is_late
        elif what == "restart":
            world.ramps = Ramps()
            well_s = 0.0
        elif rollout.ramp is not None:
            sums, ramp = world._sums, rollout.ramp
            changed = Ramp(ramp.shares, ramp.every_s, ramp.min_requests, paused=what == "pause")
            world.change(Change(1, f"s{number}", RAMP, "mine", ramp=changed))
            world._sums = sums
    assert all(one < other for one, other in pairwise(shares))
    assert set(shares) <= set(SHARES)


def test_what_a_router_says_of_another_share_does_not_count() -> None:
    """It has not applied the last change, or has said it before."""
    world = mesh()
    sums = Side(500, 0, [500.0, *[0.0] * 14])
    stale = Trial("mine", 1, 2, 0.5, False, 1.0, sums, sums)
    said = [RouterControl("r", world.fold.version, [], trials=[stale])]
    for second in range(200):
        assert world.ramps.look(world.fold, said, 1000.0 + second) == []
    assert world.ramps.states(world.fold)[0].num_requests == 0
