"""When a version is given up: by its errors, beside the stable one, by its publisher's bounds."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.services.router.rollout.window import (
    MAX_ERROR_SHARE,
    MIN_ERRORS,
    MIN_FAR_OVER,
    MIN_TIMED,
    WINDOW_S,
    Bounds,
    End,
    VersionWindow,
)


def window_of(*ends: End) -> VersionWindow:
    window = VersionWindow()
    for end in ends:
        window.add(end)
    return window


def test_a_version_is_given_up_when_its_errors_are_many_and_a_large_share() -> None:
    assert not window_of(*[End(0.0, True)] * (MIN_ERRORS - 1)).too_many_errors()
    assert window_of(*[End(0.0, True)] * MIN_ERRORS).too_many_errors()
    few = VersionWindow()
    for number in range(2500):
        few.add(End(0.0, number % 20 == 19))
        assert not few.too_many_errors(), "five in a hundred are below the bound"


def test_errors_outside_the_window_and_of_long_ago_are_forgotten() -> None:
    window = window_of(*[End(0.0, True)] * (MIN_ERRORS - 1), *[End(WINDOW_S + 1, False)] * MIN_TIMED)
    window.add(End(WINDOW_S + 1, True))
    assert not window.too_many_errors(), "others have come in their place"


def test_one_request_a_minute_is_judged_by_its_last_requests() -> None:
    """However seldom it is asked for: a version that fails each time fails each time."""
    window = VersionWindow()
    for number in range(MIN_ERRORS):
        assert not window.too_many_errors()
        window.add(End(number * 60.0, True))
    assert window.too_many_errors()


@given(st.lists(st.tuples(st.floats(0.0, 5.0), st.booleans()), min_size=1, max_size=80))
def test_the_count_of_errors_is_that_of_the_window_or_of_the_last_requests(
    steps: list[tuple[float, bool]],
) -> None:
    window, ends, now = VersionWindow(), [], 0.0
    for seconds, failed in steps:
        now += seconds
        ends.append((now, failed))
        window.add(End(now, failed))
        counting = [
            failure
            for number, (at, failure) in enumerate(reversed(ends))
            if now - at <= WINDOW_S or number < MIN_TIMED
        ]
        is_bad = sum(counting) >= MIN_ERRORS and sum(counting) > MAX_ERROR_SHARE * len(counting)
        assert bool(window.too_many_errors()) == is_bad


@given(st.lists(st.floats(-1e6, 1e6), max_size=200))
def test_no_time_of_a_clock_gives_a_good_version_up(times: list[float]) -> None:
    window, stable = VersionWindow(), VersionWindow()
    for at in times:
        window.add(End(at, False, 0.1, 0.01))
        stable.add(End(-at, False, 0.1, 0.01))
        found = (window.too_many_errors(), window.over(Bounds(0.2, 0.02)), window.slower_than(stable))
        assert found == ("", "", "")


def test_a_canary_is_slow_beside_the_stable_version_only() -> None:
    stable = window_of(*[End(0.0, False, 0.1, 0.01)] * MIN_TIMED)
    assert "TTFT" in window_of(*[End(0.0, False, 0.25, 0.01)] * MIN_TIMED).slower_than(stable)
    assert "TPOT" in window_of(*[End(0.0, False, 0.1, 0.025)] * MIN_TIMED).slower_than(stable)
    assert not window_of(*[End(0.0, False, 0.19, 0.011)] * MIN_TIMED).slower_than(stable)
    assert not window_of(*[End(0.0, False, 0.2)] * (MIN_TIMED - 1)).slower_than(stable), "too few to tell"
    assert not window_of(*[End(0.0, False, 0.2)] * MIN_TIMED).slower_than(VersionWindow())
    quick = window_of(*[End(0.0, False, 0.001)] * MIN_TIMED)
    assert not window_of(*[End(0.0, False, 0.01)] * MIN_TIMED).slower_than(quick), "milliseconds are noise"


def test_a_version_is_held_to_its_publishers_own_bounds() -> None:
    window = window_of(*[End(0.0, False, 0.1, 0.01)] * 27, *[End(0.0, False, 0.9, 0.05)] * 4)
    assert window.over(Bounds()) == ""
    assert "TTFT" in window.over(Bounds(ttft_s=0.5))
    assert "TPOT" in window.over(Bounds(tpot_s=0.02))
    assert window.over(Bounds(ttft_s=1.0, tpot_s=0.1)) == ""
    few = window_of(*[End(0.0, False, 9.0, 9.0)] * (MIN_FAR_OVER - 1))
    assert few.over(Bounds(ttft_s=0.5)) == "", "too few to tell"
    few.add(End(0.0, False, 9.0, 9.0))
    assert "TTFT" in few.over(Bounds(ttft_s=0.5)), "nobody waits for more of what is over its bound each time"
    mostly = window_of(*[End(0.0, False, 0.1)] * 15, *[End(0.0, False, 9.0)] * 14)
    assert mostly.over(Bounds(ttft_s=0.5)) == "", "of few the half must be over it"


def test_times_count_by_number_where_few_come() -> None:
    """A canary of a tenth, at four requests a second: 0.4 a second, four within the window."""
    canary, stable = VersionWindow(), VersionWindow()
    for number in range(10 * MIN_TIMED):
        at = number / 4
        if number % 10:
            stable.add(End(at, False, 0.1, 0.01))
        else:
            canary.add(End(at, False, 0.5, 0.01 if number % 20 else None))
    assert "TTFT" in canary.over(Bounds(ttft_s=0.1))
    assert "TTFT" in canary.slower_than(stable)


@pytest.mark.slow
@pytest.mark.parametrize("gap_s", [0.01, 3.0], ids=["busy", "seldom"])
def test_equals_are_no_slower_where_half_of_the_prompts_are_long(gap_s: float) -> None:
    """Medians of two such samples are far apart again and again; a canary that is slow is found all the
    same."""
    rng = random.Random(7)

    def ttft_s() -> float:
        return rng.lognormvariate(0.0, 0.2) * rng.choice([0.05, 1.5])

    canary, slow, stable = VersionWindow(), VersionWindow(), VersionWindow()
    num_slow = 0
    for number in range(5000):
        at = gap_s * number
        if number % 2:
            stable.add(End(at, False, ttft_s()))
        else:
            canary.add(End(at, False, ttft_s()))
            slow.add(End(at, False, 5 * ttft_s()))
            num_slow += bool(slow.slower_than(stable))
            assert not canary.slower_than(stable)
    assert num_slow > 100


def test_both_are_compared_over_the_same_time() -> None:
    """What load did to the one an hour ago is not what it does to the other now."""
    stable = window_of(*[End(float(at), False, 0.1) for at in range(1000)])
    for at in range(1000, 1100):
        stable.add(End(float(at), False, 1.0))
    canary = window_of(*[End(1000 + 3.3 * number, False, 1.0) for number in range(MIN_TIMED)])
    assert not canary.slower_than(stable)


def test_times_are_not_looked_at_for_every_request_where_many_come() -> None:
    window, looks = VersionWindow(), 0
    for number in range(2000):
        window.add(End(number / 500, False, 0.1))
        looks += window.is_due()
        assert looks > number or number > 31, "of few, each counts"
    assert looks < 300


def test_holding_the_router_counts_like_an_error() -> None:
    held = End(0.0, False, slow=True)
    assert not window_of(*[held] * (MIN_ERRORS - 1)).too_many_errors()
    assert "held the router" in window_of(*[held] * MIN_ERRORS).too_many_errors()
    assert not window_of(*[held] * MIN_ERRORS, *[End(0.0, False)] * 50).too_many_errors()
