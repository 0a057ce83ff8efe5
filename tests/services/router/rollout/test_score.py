"""What a decision costs by the cost model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.messages.engine import EngineLoad
from microserve.services.router.engines.load import Load
from microserve.services.router.engines.prediction import EngineView
from microserve.services.router.request.decision import Decision, Send
from microserve.services.router.rollout.score import Cost, cost_of


def view(ahead: int = 0, rate: float = 100.0) -> EngineView:
    """Of an engine that computes 100 tokens a second and has so many before it."""
    return EngineView(EngineLoad(prefill_tokens_per_s=rate, free_blocks=99), 0.0, Load(ahead, 0), 16, 100)


def instant(_source: str, _target: str, _num_tokens: int) -> float:
    return 0.0


def cost(decision: Decision, cached: dict[str, int] | None = None, **views: EngineView) -> Cost:
    found = cost_of(decision, 1000, cached or {}, views, lambda s, t, n: n / 500)
    assert found is not None
    return found


def test_one_engine_works_off_its_queue_and_what_it_has_not_cached() -> None:
    assert cost(Decision([], "d"), {"d": 200}, d=view(50)) == Cost(0.5 + 8.0, 800, 0)


def test_the_shares_run_side_by_side_and_the_border_counts_once() -> None:
    decision = Decision([Send("p", "d", 0, 600)], "d", 600)
    found = cost(decision, d=view(), p=view(100))
    assert found.ttft_s == pytest.approx(1.0 + 6.0 + 4.0)
    assert (found.computed_tokens, found.sent_tokens) == (1000, 600)


def test_a_slow_link_is_what_is_waited_for() -> None:
    decision = Decision([Send("p", "d", 0, 1000)], "d", 1000, awaits_first=True)
    assert cost(decision, {"p": 1000}, d=view(), p=view()) == Cost(2.0, 0, 1000)
    assert cost(decision, {"p": 1000}, d=view(300), p=view()) == Cost(3.0, 0, 1000)


def test_an_engine_that_was_not_there_makes_it_unknown() -> None:
    assert cost_of(Decision([], "gone"), 10, {}, {}, instant) is None
    assert cost_of(Decision([Send("gone", "d", 0, 5)], "d", 5), 10, {}, {"d": view()}, instant) is None


@given(
    split=st.integers(0, 1000),
    cached=st.integers(0, 1000),
    queue=st.integers(0, 5000),
    more=st.integers(0, 5000),
)
def test_a_longer_queue_or_a_shorter_match_never_makes_it_sooner(
    split: int, cached: int, queue: int, more: int
) -> None:
    decision = Decision([Send("p", "d", 0, split)] if split else [], "d", split)
    base = cost(decision, {"p": cached}, d=view(), p=view(queue))
    assert cost(decision, {"p": cached}, d=view(), p=view(queue + more)).ttft_s >= base.ttft_s
    assert cost(decision, {"p": cached}, d=view(more), p=view(queue)).ttft_s >= base.ttft_s
    assert cost(decision, {}, d=view(), p=view(queue)) >= base
