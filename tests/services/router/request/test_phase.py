import math

from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.messages.engine import Timings
from microserve.protocol.messages.router import Phases
from microserve.services.router.request.phase import PhaseClock

TIMES = st.floats(0, 100, allow_nan=False)


@given(
    st.floats(0, 100, allow_nan=False),
    TIMES,
    st.lists(
        st.tuples(st.sampled_from(["routed", "granted", "sent", "accepted", "first_token"]), TIMES),
        max_size=12,
    ),
    st.none() | st.builds(Timings, TIMES, TIMES, TIMES, TIMES, TIMES),
)
def test_phases_are_durations_that_add_up_whatever_happened(
    start: float, length: float, marks: list[tuple[str, float]], timings: Timings | None
) -> None:
    clock = PhaseClock(start)
    for name, at in marks:
        if name == "sent":
            clock.sent(start, start + at, timings or Timings())
        else:
            getattr(clock, name)(start + at)
    phases = clock.phases(start + length, timings)
    parts = [getattr(phases, name) for name in Phases.__struct_fields__ if name != "total_s"]
    assert all(part >= 0 for part in parts)
    assert math.isclose(sum(parts), phases.total_s, abs_tol=1e-9)


def test_a_disaggregated_request() -> None:
    clock = PhaseClock(10.0)
    clock.routed(10.1)
    clock.granted(10.2)
    clock.accepted(10.25)
    clock.sent(10.2, 10.9, Timings(queued_s=0.1, prefill_s=0.5))
    clock.first_token(11.2)
    phases = clock.phases(12.0, Timings(arrival_s=0.7, queued_s=0.05))
    expected = Phases(2.0, 0.1, 0.1, 0.6, 0.1, 0.1, 0.2, 0.8)
    for name in Phases.__struct_fields__:
        assert math.isclose(getattr(phases, name), getattr(expected, name), abs_tol=1e-9), name


def test_marks_that_come_twice() -> None:
    clock = PhaseClock(0.0)
    clock.first_token(1.0)
    clock.first_token(2.0)
    assert clock.phases(3.0).decoded_s == 2.0
