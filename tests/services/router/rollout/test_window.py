"""When a version is given up: by its errors, beside the stable one, by its publisher's bounds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from microserve.services.router.rollout.window import (
    MAX_ERROR_SHARE,
    MIN_ERRORS,
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


def test_errors_outside_the_window_are_forgotten() -> None:
    window = VersionWindow()
    for number in range(50):
        window.add(End(number * WINDOW_S, True))
        assert not window.too_many_errors()


@given(st.lists(st.tuples(st.floats(0.0, 5.0), st.booleans()), min_size=1, max_size=80))
def test_the_count_of_errors_is_that_of_the_window(steps: list[tuple[float, bool]]) -> None:
    window, ends, now = VersionWindow(), [], 0.0
    for seconds, failed in steps:
        now += seconds
        ends.append((now, failed))
        window.add(End(now, failed))
        recent = [failure for at, failure in ends if now - at <= WINDOW_S]
        is_bad = sum(recent) >= MIN_ERRORS and sum(recent) > MAX_ERROR_SHARE * len(recent)
        assert bool(window.too_many_errors()) == is_bad


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
    few = window_of(*[End(0.0, False, 9.0, 9.0)] * (MIN_TIMED - 1))
    assert few.over(Bounds(ttft_s=0.5)) == ""


def test_holding_the_router_counts_like_an_error() -> None:
    held = End(0.0, False, slow=True)
    assert not window_of(*[held] * (MIN_ERRORS - 1)).too_many_errors()
    assert "held the router" in window_of(*[held] * MIN_ERRORS).too_many_errors()
    assert not window_of(*[held] * MIN_ERRORS, *[End(0.0, False)] * 50).too_many_errors()
