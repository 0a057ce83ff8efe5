"""Phases of the canonical line: none negative, and together exactly the time that passed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from microserve.gateway.generation.summary import phase_durations
from microserve.gateway.text.answer.choice import Timeline
from microserve.protocol.messages.router import PHASES, Phases

SECONDS = st.floats(0.0, 100.0) | st.sampled_from([float("nan"), float("inf"), -1.0])
STEPS = st.lists(st.floats(0.0, 100.0), min_size=4, max_size=4)


@given(steps=STEPS, reached=st.integers(0, 3), router=st.none() | st.lists(SECONDS, min_size=8, max_size=8))
def test_phases_add_up(steps: list[float], reached: int, router: list[float] | None) -> None:
    arrived = 1000.0
    stamps = [arrived + sum(steps[: i + 1]) for i in range(4)]
    times = Timeline(arrived, *[stamp if i < reached else None for i, stamp in enumerate(stamps[:3])])
    times.ended = stamps[3]
    durations = phase_durations(times, None if router is None else Phases(*router))
    assert list(durations) == list(PHASES)
    assert all(value >= 0 for value in durations.values())
    assert sum(durations.values()) == round((times.ended - arrived) * 1e6)


def test_the_bus_goes_to_routed_and_delivery_to_decoded() -> None:
    times = Timeline(10.0, tokenising=10.1, submitted=10.3, first_token=11.3, ended=13.3)
    router = Phases(2.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 1.9)
    assert phase_durations(times, router) == {
        "queued": 100_000,
        "tokenised": 200_000,
        "routed": 500_000,  # 0.1 s in the router and 0.4 s on the bus
        "granted": 100_000,
        "prefilled": 100_000,
        "transferred": 100_000,
        "admitted": 100_000,
        "first_token": 100_000,
        "decoded": 2_000_000,  # 1.9 s in the router and 0.1 s of delivery
    }


def test_a_request_that_got_nowhere() -> None:
    assert phase_durations(Timeline(1.0, ended=3.0), None)["queued"] == 2_000_000
    refused = phase_durations(Timeline(1.0, tokenising=2.0, ended=3.0), None)
    assert (refused["queued"], refused["tokenised"]) == (1_000_000, 1_000_000)
    waited = phase_durations(Timeline(1.0, tokenising=2.0, submitted=2.0, ended=3.0), None)
    assert (waited["routed"], waited["decoded"]) == (1_000_000, 0)
