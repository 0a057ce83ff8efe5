"""The planner: table 6 of PrfaaS from its table 5, its optimum, and other cases by another program."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from microserve.protocol.errors import ConfigError
from microserve.services.clusters.curve import Curve
from microserve.services.clusters.lengths import Lengths, LengthSpec, LogNormal
from microserve.services.clusters.planner import homogeneous, offload_all, rate_at, solve
from microserve.services.clusters.profile import ClusterProfile, Side, load_profile

FILE = Path(__file__).parents[3] / "examples/clusters/prfaas.json"
PAPER = load_profile(FILE)
assert PAPER.lengths is not None
LENGTHS = Lengths.of(PAPER.lengths)


@pytest.mark.quick
def test_table_6_from_table_5() -> None:
    plan = solve(PAPER, LENGTHS)
    assert abs(plan.threshold - 19_400) <= 600
    assert (plan.num_remote, plan.num_prefill, plan.num_decode) == (4, 3, 5)
    assert plan.rate == pytest.approx(3.24, rel=0.025)
    assert 12.0 <= plan.link_bytes_per_s * 8e-9 <= 13.5
    assert (plan.mean_ttft_s, plan.p90_ttft_s) == pytest.approx((2.22, 3.51), rel=0.06)
    alone = homogeneous(PAPER, LENGTHS, 12)
    assert (alone.num_prefill, alone.num_decode) == (9, 3)
    assert alone.rate == pytest.approx(2.11, rel=0.01)
    assert (alone.mean_ttft_s, alone.p90_ttft_s) == pytest.approx((4.44, 9.73), rel=0.01)
    everything = offload_all(PAPER, LENGTHS)
    assert everything.rate == pytest.approx(2.45, rel=0.05)
    assert (everything.num_prefill, everything.num_decode) == (0, 8)


@pytest.mark.quick
def test_the_paper_s_lengths() -> None:
    part = LENGTHS.part([19_400.0])
    assert LENGTHS.mean == pytest.approx(27_500, rel=0.01)
    assert LENGTHS.quantile(LENGTHS.values, 0.9) == pytest.approx(62_300, rel=0.01)
    found = part.share_long[0], part.mean_long[0], part.mean_short[0]
    assert found == pytest.approx((0.4955, 45_000, 10_200), rel=0.01)


def test_straight_lines_between_the_four_points_say_nearly_the_same() -> None:
    """The points may be read either way: the lines lie above the parabola, so that they promise less."""
    lines = replace(PAPER.remote, prefill_s=replace(PAPER.remote.prefill_s, fit="linear"))
    plan = solve(replace(PAPER, remote=lines), LENGTHS)
    assert abs(plan.threshold - 19_400) <= 600
    assert (plan.num_prefill, plan.num_decode) == (3, 5)
    assert plan.rate == pytest.approx(3.24, rel=0.025)


def test_both_sides_are_equally_full_at_the_best_threshold_and_less_is_served_beside_it() -> None:
    plan = solve(PAPER, LENGTHS)
    remote, local = plan.remote_rate / plan.share_long, plan.prefill_rate / (1 - plan.share_long)
    assert remote == pytest.approx(local, rel=0.02)
    for factor in (0.8, 1.2):
        assert rate_at(PAPER, LENGTHS, plan.threshold * factor, plan.num_prefill).rate < plan.rate * 0.99


def test_the_threshold_rises_as_the_link_falls() -> None:
    plans = [solve(PAPER, LENGTHS, link_gbps=gbps) for gbps in (100, 13, 10, 5)]
    thresholds = [plan.threshold for plan in plans]
    assert thresholds == sorted(thresholds)
    assert plans[0] == replace(plans[1], link_share=plans[0].link_share)
    assert [plan.bound for plan in plans[2:]] == ["link", "link"]
    assert thresholds[2:] == pytest.approx([25_400, 42_000], rel=0.01)
    assert [plan.num_prefill for plan in plans] == [3, 3, 4, 5]
    assert [plan.rate for plan in plans[2:]] == pytest.approx([3.06, 2.27], rel=0.005)


# --- others, by brute force of another hand ----------------------------------------------------------


def curve(points: list[tuple[float, float]], length: float) -> float:
    """Straight lines, in plain Python."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if length <= x1 or (x1, y1) == points[-1]:
            return max(0.0, y0 + (length - x0) * (y1 - y0) / (x1 - x0))
    raise AssertionError


def brute(
    sample: list[float],
    there: list[tuple[float, float]],
    here: tuple[float, float, float],
    kv: list[tuple[float, float]],
    gbps: float,
    num_there: int,
    num_here: int,
    answers: float,
) -> tuple[float, int, int]:
    best = (0.0, 0, 0)
    for threshold in range(0, int(max(sample)) + 500, 500):
        long = [each for each in sample if each > threshold]
        short = [each for each in sample if each <= threshold]
        share = len(long) / len(sample)
        remote = math.inf
        if long:
            mean = sum(long) / len(long)
            remote = min(num_there / curve(there, mean), gbps / 8 * 1e9 / curve(kv, mean)) / share
        for num_prefill in range(num_here + 1):
            local = math.inf
            if short:
                mean = sum(short) / len(short)
                seconds = here[0] + here[1] * mean + here[2] * mean * mean
                local = num_prefill / seconds / (1 - share)
            rate = min(remote, local, (num_here - num_prefill) * answers)
            if rate > best[0] * (1 + 1e-9):
                best = (rate, threshold, num_prefill)
    return best


@pytest.mark.parametrize("seed", range(8))
def test_a_hidden_case_is_what_brute_force_finds(seed: int) -> None:
    rng = random.Random(f"planner {seed}")
    mu, sigma = rng.uniform(7.5, 10.5), rng.uniform(0.4, 1.4)
    sample = [min(max(rng.lognormvariate(mu, sigma), 64.0), 131_072.0) for _ in range(600)]
    scale = rng.uniform(0.2, 2.0)
    there = [(1024.0, 0.3 * scale), (16_384.0, 1.0 * scale), (131_072.0, 9.0 * scale)]
    here = (rng.uniform(0.1, 0.6), rng.uniform(5e-5, 3e-4), rng.uniform(1e-10, 8e-10))
    kv = [(1024.0, 2e8), (131_072.0, rng.uniform(1e9, 2e10))]
    gbps, num_there, num_here = rng.uniform(2, 200), rng.randint(1, 9), rng.randint(2, 14)
    places, step_s, output_tokens = rng.randint(4, 60), rng.uniform(0.01, 0.05), rng.uniform(100, 2000)
    profile = ClusterProfile(
        version=1,
        kv_nbytes=Curve(kv),
        link_gbps=gbps,
        output_tokens=output_tokens,
        remote=Side(num_there, Curve(there, fit="linear")),
        local=Side(num_here, Curve(quadratic=here), places=places, step_s=step_s),
    )
    plan = solve(profile, Lengths(sample), step_tokens=500)
    answers = places / (step_s * output_tokens)
    rate, threshold, num_prefill = brute(sample, there, here, kv, gbps, num_there, num_here, answers)
    assert plan.rate == pytest.approx(rate, rel=1e-6)
    at = rate_at(profile, Lengths(sample), threshold, num_prefill)
    assert at.rate == pytest.approx(plan.rate, rel=1e-6), "as much is served where brute force found its best"


def test_of_equal_plans_the_one_with_the_least_over_the_link() -> None:
    """Decoding bounds all: whether few or many are computed there changes nothing but the link's load."""
    slow = replace(PAPER, local=replace(PAPER.local, step_s=0.2))
    plan = solve(slow, LENGTHS)
    assert plan.bound == "decode"
    less = rate_at(slow, LENGTHS, plan.threshold + 400, plan.num_prefill)
    assert less.rate < plan.rate


# --- lengths and files -------------------------------------------------------------------------------


@pytest.mark.quick
def test_a_histogram_and_what_it_was_made_of_part_alike() -> None:
    values = np.random.default_rng(3).uniform(0, 8000, 4000)
    counts, ends = np.histogram(values, bins=40, range=(0, 8000))
    made = Lengths.from_histogram([*zip(ends[1:], counts, strict=True)])
    one, other = Lengths(values).part([3000.0]), made.part([3000.0])
    assert other.share_long[0] == pytest.approx(one.share_long[0], rel=0.02)
    assert other.mean_long[0] == pytest.approx(one.mean_long[0], rel=0.02)
    assert other.mean_short[0] == pytest.approx(one.mean_short[0], rel=0.02)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (LengthSpec(), "lengths"),
        (LengthSpec(histogram=[(10.0, 0.0)]), "lengths"),
        (LengthSpec(histogram=[(10.0, 1.0), (10.0, 1.0)]), "lengths.histogram"),
        (LengthSpec(log_normal=LogNormal(1.0, 1.0, 10.0, 5.0)), "lengths.log_normal.high"),
        (LengthSpec(log_normal=LogNormal(100.0, 0.1, 1.0, 5.0)), "lengths.log_normal"),
    ],
)
def test_lengths_that_are_none_are_refused(spec: LengthSpec, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Lengths.of(spec)
    assert caught.value.field == field


@pytest.mark.quick
@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ('"version": 1', '"version": 2', "version"),
        ('"places": 20,', "", "local.places"),
        ('"step_s": 0.025', '"step_s": 0', "local.step_s"),
        ("[8192, 0.72]", "[512, 0.72]", "remote.prefill_s.points"),
        ('"quadratic": [0.468, 0.0001301, 2.976e-10]', "", "local.prefill_s"),
        ('"quadratic": [0.468,', '"quadratic": [-1,', "local.prefill_s.quadratic"),
        ('"link_gbps": 100', '"link_gbps": 0', "profile"),
        ('"link_gbps": 100', '"link_gpbs": 100', "profile"),
        ('"link_gbps": 100', '"link_gbps": ', "profile"),
    ],
)
def test_a_wrong_profile_is_refused_by_its_field(old: str, new: str, field: str, tmp_path: Path) -> None:
    text = FILE.read_text()
    assert old in text
    path = tmp_path / "profile.json"
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_profile(path)
    assert caught.value.field == field
    assert str(path) in caught.value.detail


@pytest.mark.quick
def test_a_plan_without_a_link_or_with_a_split_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="link_gbps"):
        solve(PAPER, LENGTHS, link_gbps=0.0)
    with pytest.raises(ConfigError, match="splits"):
        rate_at(PAPER, LENGTHS, 1000.0, 9)
