"""What a key may use: the rate holds in the long run, nothing unused is kept, and refusals say when."""

from __future__ import annotations

import math
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.gateway.keys.bucket import Bucket
from microserve.gateway.keys.key import ApiKey
from microserve.gateway.keys.quota import BudgetSpent, Quota, Quotas, RateLimited, Visit, duration_text
from microserve.gateway.keys.usage import Counts, UsageBook
from microserve.protocol.errors import CapacityError, InvalidRequest

DAY = 86_400.0
limits = st.integers(1, 10_000)
steps = st.lists(st.tuples(st.floats(0.0, 100.0), st.integers(0, 10_000)), max_size=60)


@settings(deadline=None)
@given(limit=limits, steps=steps)
def test_no_stretch_of_time_gives_more_than_a_minute_and_the_rate(
    limit: int, steps: list[tuple[float, int]]
) -> None:
    bucket, now, taken = Bucket(limit, 0.0), 0.0, 0
    for passed_s, wanted in steps:
        now += passed_s
        if bucket.wait_s(wanted, now) == 0.0:
            amount = min(wanted, limit)
            bucket.take(amount, now)
            taken += amount
        assert taken <= limit + limit * now / 60.0 + 1e-3
        assert bucket.level(now) >= -1e-6


@settings(deadline=None)
@given(limit=limits, used=st.integers(0, 50_000), wanted=st.integers(1, 50_000))
def test_whoever_waits_as_long_as_is_said_is_let_in_and_no_sooner(limit: int, used: int, wanted: int) -> None:
    bucket = Bucket(limit, 0.0)
    bucket.take(used, 0.0)
    wait_s = bucket.wait_s(wanted, 0.0)
    reset_s = bucket.reset_s(0.0)
    if wait_s > 0.01:
        assert bucket.wait_s(wanted, wait_s * 0.99) > 0.0
    assert bucket.wait_s(wanted, wait_s + 1e-6) == pytest.approx(0.0, abs=1e-6)
    assert bucket.level(reset_s + 1e-6) == pytest.approx(limit)


@settings(deadline=None)
@given(limit=limits, owed=st.integers(0, 100_000), back_s=st.floats(0.0, 100.0))
def test_what_is_owed_is_paid_by_time_alone(limit: int, owed: int, back_s: float) -> None:
    bucket = Bucket(limit, 100.0)
    bucket.take(limit + owed, 100.0)
    assert bucket.level(100.0) == -owed
    assert bucket.level(100.0 - back_s) == -owed, "a clock that goes back pays nothing"
    assert bucket.level(160.0) == pytest.approx(limit - owed)


@settings(deadline=None)
@given(changes=st.lists(limits, min_size=1, max_size=5))
def test_other_limits_forgive_nothing(changes: list[int]) -> None:
    bucket = Bucket(1000, 0.0)
    bucket.take(900, 0.0)
    for limit in changes:
        bucket.change_limit(limit, 0.0)
        assert bucket.level(0.0) <= limit - 900


def quota(**limits: Any) -> Quota:
    return Quota(ApiKey(name="a", **limits), UsageBook(), 0.0)


def refused(quota: Quota, now: float = 0.0, wall: float = 0.0) -> float:
    """After how many seconds to come again."""
    with pytest.raises(CapacityError) as caught:
        quota.enter(now, wall)
    return caught.value.retry_after_s


def test_requests_a_minute() -> None:
    limited = quota(requests_per_minute=2)
    for _ in range(2):
        limited.enter(0.0, 0.0).settle(Counts(), 0.0, 0.0)
    assert refused(limited) == pytest.approx(30.0)
    assert refused(limited, 29.0) == pytest.approx(1.0)
    limited.enter(30.1, 0.0)
    assert limited.headers(30.1) == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
    }


def test_streams_at_a_time() -> None:
    limited = quota(concurrent_streams=3)
    visit = limited.enter(0.0, 0.0)
    visit.reserve(2, 10, 0.0, 0.0)
    other = limited.enter(0.0, 0.0)
    assert refused(limited) > 0
    with pytest.raises(RateLimited):
        other.reserve(2, 10, 0.0, 0.0)
    assert limited.num_streams == 2, "a request that is refused gives its place back"
    with pytest.raises(InvalidRequest) as caught:
        limited.enter(0.0, 0.0).reserve(4, 10, 0.0, 0.0)
    assert caught.value.field == "n", "it would be refused for ever"
    visit.settle(Counts(), 1.0, 0.0)
    visit.settle(Counts(), 1.0, 0.0)
    assert limited.num_streams == 1


def test_tokens_a_minute_are_reserved_and_settled() -> None:
    limited = quota(tokens_per_minute=1000)
    visit = limited.enter(0.0, 0.0)
    visit.reserve(1, 900, 0.0, 0.0)
    assert limited.headers(0.0)["x-ratelimit-remaining-tokens"] == "100"
    with pytest.raises(RateLimited) as caught:
        limited.enter(0.0, 0.0).reserve(1, 400, 0.0, 0.0)
    assert caught.value.retry_after_s == pytest.approx(300 * 60 / 1000)
    visit.settle(Counts(1, 0, 100, 0, 50), 0.0, 0.0)
    assert limited.headers(0.0)["x-ratelimit-remaining-tokens"] == "850"
    assert limited.reserved_tokens == 0


def test_a_request_above_a_minutes_worth_waits_for_all_of_it_and_owes_the_rest() -> None:
    limited = quota(tokens_per_minute=100)
    visit = limited.enter(0.0, 0.0)
    visit.reserve(1, 4000, 0.0, 0.0)
    visit.settle(Counts(1, 0, 1000, 0, 0), 0.0, 0.0)
    assert refused(limited) == pytest.approx(901 * 60 / 100), "until it has paid"
    limited.enter(600.0, 0.0)


def test_a_days_budget_begins_anew_at_midnight() -> None:
    limited = quota(daily_token_budget=100)
    visit = limited.enter(0.0, 1000.0)
    visit.reserve(1, 100, 0.0, 1000.0)
    assert refused(limited, 0.0, 1000.0) == DAY - 1000.0, "all of it is in hand"
    visit.settle(Counts(1, 0, 30, 0, 30), 0.0, 1000.0)
    limited.enter(0.0, 1000.0).settle(Counts(1, 0, 60, 0, 0), 0.0, 1000.0)
    with pytest.raises(BudgetSpent):
        limited.enter(0.0, DAY - 1.0)
    limited.enter(0.0, DAY)


def test_other_limits_for_a_name_take_over_what_is_in_hand() -> None:
    book = UsageBook()
    quotas = Quotas(book, clock=lambda: 0.0, wall_clock=lambda: 0.0)
    visit = quotas.enter(ApiKey(name="a", concurrent_streams=1))
    with pytest.raises(RateLimited):
        quotas.enter(ApiKey(name="a", concurrent_streams=1))
    larger = ApiKey(name="a", concurrent_streams=2)
    quotas.enter(larger)
    quotas.keep_only([])
    assert quotas.streams() == {"a": 2}, "what runs is not forgotten"
    quotas.settle(visit, Counts(requests=1))
    assert quotas.streams() == {"a": 1}
    assert book.total["a"] == Counts(requests=1, refused=1)


@settings(deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_nothing_is_left_when_all_is_over(seed: int) -> None:
    """Any order of beginnings, refusals and ends."""
    rng, now = random.Random(seed), 0.0
    limited = quota(
        requests_per_minute=rng.choice([0, 60]),
        tokens_per_minute=rng.choice([0, 5000]),
        concurrent_streams=rng.choice([0, 4]),
        daily_token_budget=rng.choice([0, 20_000]),
    )
    visits: list[Visit] = []
    for _ in range(60):
        now += rng.random()
        try:
            if visits and rng.random() < 0.5:
                visits.pop(rng.randrange(len(visits))).settle(Counts(1, 0, rng.randrange(900)), now, now)
            else:
                visit = limited.enter(now, now)
                visits.append(visit)
                visit.reserve(rng.randint(1, 5), rng.randrange(2000), now, now)
        except (CapacityError, InvalidRequest):
            pass
        key = limited.key
        assert 0 <= limited.num_streams <= (key.concurrent_streams or 10**9)
        assert limited.reserved_tokens >= 0
    for visit in visits:
        visit.settle(Counts(), now, now)
    assert (limited.num_streams, limited.reserved_tokens) == (0, 0)


@settings(deadline=None)
@given(seconds=st.floats(0.0, 1e6))
def test_times_in_headers_are_openais(seconds: float) -> None:
    text = duration_text(seconds)
    found = re.fullmatch(r"(?:(\d+)ms)|(?:(?:(\d+)h)?(?:(\d+)m)?(\d+)s)", text)
    assert found is not None
    ms, hours, minutes, rest = (int(part or 0) for part in found.groups())
    assert ms / 1000 + hours * 3600 + minutes * 60 + rest == pytest.approx(
        math.ceil(seconds * 1000) / 1000 if seconds < 1 else math.ceil(seconds)
    )


def test_times_in_headers() -> None:
    assert [duration_text(s) for s in (0, 0.0071, 8, 360, 3723.5)] == ["0ms", "8ms", "8s", "6m0s", "1h2m4s"]
