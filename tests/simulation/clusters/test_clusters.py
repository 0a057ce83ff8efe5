"""Two clusters with queues: bounded below what is planned, growing above it; a link that falls for a minute.

``make test`` needs no more than seconds for hours of them: engines and link are figures.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from microserve.services.clusters.lengths import Lengths
from microserve.services.clusters.planner import homogeneous, offload_all, solve
from microserve.services.clusters.profile import load_profile
from microserve.services.clusters.threshold import Threshold
from microserve.services.simulation.clusters.figures import figures
from microserve.services.simulation.clusters.policy import (
    ByLink,
    ByLoad,
    ByThreshold,
    Everybody,
    Nobody,
)
from microserve.services.simulation.clusters.world import Link, Look, Policy, World

PROFILE = load_profile(Path(__file__).parents[3] / "examples/clusters/prfaas.json")
assert PROFILE.lengths is not None
LENGTHS = Lengths.of(PROFILE.lengths)
PLAN = solve(PROFILE, LENGTHS)


def run(
    policy: Policy,
    rate: float,
    *,
    num_prefill: int = PLAN.num_prefill,
    seconds: float = 7200.0,
    link: tuple[tuple[float, float], ...] = (),
    instances: int = 8,
    seed: int = 0,
) -> World:
    local = replace(PROFILE.local, instances=instances)
    world = World(replace(PROFILE, local=local), policy, num_prefill, link)
    world.run(LENGTHS, rate, seconds, seed)
    return world


@pytest.mark.parametrize("seed", range(3))
def test_queues_stay_below_the_planned_rate_and_grow_above_it(seed: int) -> None:
    below = figures(run(ByThreshold(PLAN.threshold), 0.9 * PLAN.rate, seed=seed))
    above = figures(run(ByThreshold(PLAN.threshold), 1.05 * PLAN.rate, seed=seed))
    assert below.mean_waiting < 40
    assert abs(below.growth) < 0.01
    assert above.growth > 0.1
    assert above.mean_waiting > 500
    assert below.p90_service_s < below.p90_ttft_s < 30, "what waits is in the one and not in the other"


def test_without_another_cluster_less_is_served() -> None:
    alone = homogeneous(PROFILE, LENGTHS, 12)
    below = figures(run(Nobody(), 0.9 * alone.rate, num_prefill=9, instances=12))
    at_ours = figures(run(Nobody(), 0.9 * PLAN.rate, num_prefill=9, instances=12))
    assert abs(below.growth) < 0.01
    assert at_ours.growth > 0.1
    assert below.link_share == 0.0


def test_routing_by_length_and_unequal_engines_are_two_gains() -> None:
    """The same engines under simple load balancing: the threshold adds p90 and a few per cent."""
    rate = 0.9 * PLAN.rate
    ours, balanced = figures(run(ByThreshold(PLAN.threshold), rate)), figures(run(ByLoad(), rate))
    assert abs(balanced.growth) < 0.01
    assert ours.p90_ttft_s < balanced.p90_ttft_s
    assert ours.p90_service_s < balanced.p90_service_s
    assert figures(run(ByLoad(), 0.98 * PLAN.rate)).growth > 0.01


def test_the_same_seed_is_the_same_run() -> None:
    one, other = (run(ByThreshold(PLAN.threshold), 2.5, seconds=600.0, seed=7).looks for _ in range(2))
    assert one == other
    assert one != run(ByThreshold(PLAN.threshold), 2.5, seconds=600.0, seed=8).looks


# --- the link falls from 100 to 5 Gbit/s -------------------------------------------------------------

BEGIN_S = 600.0


def falling(policy: Policy, seconds: float, num_prefill: int = PLAN.num_prefill) -> list[Look]:
    link = ((0.0, 100.0), (BEGIN_S, 5.0), (BEGIN_S + seconds, 100.0))
    return run(policy, 1.6, num_prefill=num_prefill, seconds=1800.0, link=link).looks


def most(looks: list[Look]) -> float:
    return max(look.link_nbytes for look in looks)


def test_the_threshold_rises_with_the_link_s_fall_and_comes_back() -> None:
    looks = falling(ByLink(Threshold(PLAN.threshold, most=LENGTHS.longest)), 60.0)
    before = [look for look in looks if look.at_s <= BEGIN_S]
    within = [look for look in looks if BEGIN_S < look.at_s <= BEGIN_S + 60]
    assert {look.threshold for look in before} == {PLAN.threshold}
    assert max(look.threshold for look in within) > 1.5 * PLAN.threshold
    assert looks[-1].threshold == PLAN.threshold
    assert most(looks) < 4e9
    assert looks[-1].waiting < 20


def test_what_waits_for_a_slow_link_is_bounded_and_is_not_where_all_goes_across() -> None:
    by_rule = [most(falling(ByLink(Threshold(PLAN.threshold, most=LENGTHS.longest)), s)) for s in (60, 240)]
    by_nothing = [most(falling(Everybody(), s, num_prefill=0)) for s in (60, 240)]
    assert by_rule[1] < 1.5 * by_rule[0]
    assert by_nothing[1] > 3 * by_nothing[0]
    assert by_nothing[0] > 5 * by_rule[0]


def test_all_across_serves_as_much_as_its_own_plan_says_while_the_link_is_whole() -> None:
    plan = offload_all(PROFILE, LENGTHS)
    below = figures(run(Everybody(), 0.9 * plan.rate, num_prefill=0))
    assert abs(below.growth) < 0.01


def test_what_the_link_carries_is_what_was_put() -> None:
    link = Link([(0.0, 10.0), (5.0, 1.0), (9.0, 100.0)])
    assert link.put(0.0, 20.0) == pytest.approx(2.0)
    assert link.put(1.0, 10.0) == pytest.approx(3.0), "after what is there"
    assert link.put(4.0, 12.0) == pytest.approx(7.0), "10 before the fall, 2 after it"
    assert link.put(8.0, 101.0) == pytest.approx(10.0)
    assert link.queued_nbytes == 143.0
