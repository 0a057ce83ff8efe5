"""What a vLLM's time goes to, by the state of its requests."""

from __future__ import annotations

from typing import cast

import pytest

from microserve.services.engine.vllm.front.rates import LOOK_S, Occupancy
from microserve.services.engine.vllm.front.running import Running

pytestmark = pytest.mark.quick


class Request:
    """What is looked at of a ``Running``."""

    def __init__(self, first_token_at: float | None = None, *, is_parked: bool = False) -> None:
        self.first_token_at, self.is_parked = first_token_at, is_parked


def live(*requests: Request) -> list[Running]:
    return cast("list[Running]", list(requests))


def test_time_counts_as_what_the_requests_of_then_needed() -> None:
    occupancy = Occupancy()
    new, old, parked = Request(), Request(1.0), Request(is_parked=True)
    now = 0.0
    for held, awaiting, seconds in (
        (live(new, old), live(), 1.0),
        (live(old), live(), 2.0),
        (live(new), live(new), 3.0),
        (live(parked), live(), 4.0),
    ):
        occupancy.look(held, awaiting, now)
        now += seconds
    occupancy.look([], [], now)
    shares = [share.at(now) for share in (occupancy.decode, occupancy.transfer, occupancy.idle)]
    assert shares[0] < shares[1] < shares[2]
    assert 0.0 < sum(shares) < 1.0, "the rest was prefill, and the time before"
    occupancy.look(live(new), live(), now + LOOK_S / 2)
    assert occupancy.idle.at(now) == shares[2], "so soon nothing is looked at again"
    for _ in range(20):
        now += 5.0
        occupancy.look([], [], now)
    assert occupancy.idle.at(now) == pytest.approx(1.0)
