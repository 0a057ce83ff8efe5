"""A window never lets through more than was granted, and never closes for good."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from microserve.protocol.bus.credit import MAX_CREDIT, CreditMeter, CreditWindow


def test_window_lets_through_what_was_granted() -> None:
    window = CreditWindow(2)

    assert [window.take(), window.take(), window.take()] == [True, True, False]
    window.grant(1)
    assert window.credit == 1
    assert [window.take(), window.take()] == [True, False]


@pytest.mark.parametrize("credit", [0, -1, -(2**63)])
def test_window_without_credit_is_shut(credit: int) -> None:
    window = CreditWindow(credit)
    window.grant(credit)

    assert not window.take()


def test_window_is_clamped() -> None:
    window = CreditWindow(2**63)
    assert window.credit == MAX_CREDIT
    window.grant(2**63)
    assert window.credit == MAX_CREDIT


def test_meter_gives_back_half_a_window_at_a_time() -> None:
    meter = CreditMeter(8)

    assert [meter.consumed() for _ in range(8)] == [0, 0, 0, 4, 0, 0, 0, 4]


@pytest.mark.parametrize("window", [0, 1, 2])
def test_small_windows_are_given_back_at_once(window: int) -> None:
    assert CreditMeter(window).consumed() == 1


@settings(deadline=None)
@given(st.integers(1, 100), st.lists(st.sampled_from(["send", "take", "give"]), max_size=400))
def test_producer_stays_inside_the_window_and_is_never_stuck(size: int, steps: list[str]) -> None:
    """``send``: the producer sends if it may; ``take``: the consumer reads; ``give``: its credit arrives."""
    window, meter = CreditWindow(size), CreditMeter(size)
    on_the_wire = credit_on_the_wire = 0

    def step(kind: str) -> None:
        nonlocal on_the_wire, credit_on_the_wire
        if kind == "send" and window.take():
            on_the_wire += 1
        elif kind == "take" and on_the_wire:
            on_the_wire -= 1
            credit_on_the_wire += meter.consumed()
        elif kind == "give":
            window.grant(credit_on_the_wire)
            credit_on_the_wire = 0
        assert on_the_wire + window.credit + credit_on_the_wire <= size

    for kind in steps:
        step(kind)
    while on_the_wire:
        step("take")
    step("give")
    assert window.credit > size // 2 - 1
    assert window.take()
