"""Ticks: everybody's on one machine at the same moments, and none so near that it would be a second one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.process.tick import NEAREST, at_rest, between_signs, until_tick

INTERVALS_S = st.sampled_from([0.005, 0.25, 0.5, 1.0, 3.0])


@given(st.floats(0, 1e6), st.floats(0, 1e6), INTERVALS_S)
def test_who_ticks_often_enough_ticks_when_others_do(now: float, other: float, interval_s: float) -> None:
    phases = {round((each + until_tick(each, interval_s)) / interval_s, 4) % 1.0 for each in (now, other)}

    assert phases <= {0.0, 1.0}


@given(st.floats(0, 1e6), INTERVALS_S)
def test_a_tick_is_neither_at_once_nor_late(now: float, interval_s: float) -> None:
    left_s = until_tick(now, interval_s)

    assert interval_s * NEAREST < left_s <= interval_s * (1 + NEAREST)


@given(st.integers(1, 1000), INTERVALS_S)
def test_whoever_is_alive_says_so_three_times_before_it_is_lost(liveness: int, interval_s: float) -> None:
    for pause_s in (at_rest(interval_s, liveness), between_signs(interval_s, liveness)):
        num_intervals = round(pause_s / interval_s)
        assert num_intervals == 1 or num_intervals * 3 <= liveness
    assert between_signs(interval_s, 6) == at_rest(interval_s, 6)


def test_a_timer_that_was_early_brings_no_tick_twice() -> None:
    assert until_tick(9.999, 1.0) > 1.0
