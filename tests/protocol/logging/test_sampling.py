"""Of a flood so many a second are written, every one of the rest is counted, and memory is bounded."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.logging.sampling import MAX_KEYS, Key, Sampler, key_of


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0, 0.7)), max_size=200),
    st.integers(1, 5),
)
def test_admitted_and_told_are_all_that_came(arrivals: list[tuple[int, float]], max_per_s: int) -> None:
    sampler, now = Sampler(max_per_s), 0.0
    admitted: Counter[Key] = Counter()
    told: Counter[Key] = Counter()
    came: Counter[Key] = Counter()
    times: dict[Key, list[float]] = {}
    for number, pause_s in arrivals:
        now += pause_s
        key = Key("e", number, "")
        came[key] += 1
        if sampler.admit(key, now):
            admitted[key] += 1
            times.setdefault(key, []).append(now)
        for each, count in sampler.take_due(now):
            told[each] += count
    for each, count in sampler.take_due(now, all_of_it=True):
        told[each] += count
    assert admitted + told == came
    assert sampler.left_out == told.total()
    for seen in times.values():
        assert all(sum(1 for other in seen if at <= other < at + 1.0) <= 2 * max_per_s for at in seen)


def test_keys_are_bounded_and_no_count_is_lost() -> None:
    sampler = Sampler(1)
    admitted = sum(sampler.admit(Key("e", 0, f"reason {n}"), 0.0) for n in range(10 * MAX_KEYS))
    told = sampler.take_due(2.0)
    assert admitted + sum(count for _, count in told) == 10 * MAX_KEYS
    assert admitted <= MAX_KEYS + 1


def test_what_is_a_refusal() -> None:
    rejected = key_of({"event": "http.rejected", "status": 404, "code": "not_found"})
    assert rejected == ("http.rejected", 404, "not_found")
    assert key_of({"event": "request.finished", "status": 200, "code": ""}) is None
    assert key_of({"event": "engine.joined"}) is None
    assert key_of({"event": 3}) is None
