"""Whether there is another attempt, and on which terms: for any order of errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.errors import (
    CacheFull,
    Draining,
    EngineLost,
    GrantsFull,
    InvalidRequest,
    MeshError,
    NoEngines,
    PeerError,
    PromptTooLong,
    QueueFull,
    StrategyError,
    TransferFailed,
    UnknownRequest,
)
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.router.request.request import Request
from microserve.services.router.serving.failover import MAX_ATTEMPTS, MAX_PAUSE_S, Failover, MoveFailed

DEADLINE, PATIENCE_S = 100.0, 5.0
ENGINES = ["a", "b", "c"]


def failover() -> Failover:
    request = Request("r", [1, 2, 3], SamplingParams(max_tokens=8), DEADLINE, 16)
    return Failover(request, patience_s=PATIENCE_S)


def told(
    make: Callable[[str], MeshError], *, reporter: str = "", suspect: str = "", hint_s: float = 0.0
) -> MeshError:
    error = make("it went wrong")
    error.reporter, error.retry_after_s = reporter, hint_s
    error.suspect = suspect
    return error


kinds = st.sampled_from(
    (
        *(CacheFull, Draining, EngineLost, GrantsFull, InvalidRequest, MoveFailed, NoEngines),
        *(PeerError, PromptTooLong, QueueFull, StrategyError, TransferFailed, UnknownRequest),
    )
)
some_engine = st.sampled_from(["", *ENGINES])
failures = st.builds(
    told, kinds, reporter=some_engine, suspect=some_engine, hint_s=st.floats(0.0, 100.0, allow_nan=False)
)


@given(st.lists(st.tuples(failures, st.floats(0.0, 3.0)), max_size=40))
def test_attempts_are_bounded_and_what_was_learnt_is_kept(story: list[tuple[MeshError, float]]) -> None:
    decider, now, num_failed = failover(), 0.0, 0
    for error, later_s in story:
        now += later_s
        before = decider.terms
        terms = decider.decide(error, ENGINES, now)
        if terms is None:
            assert decider.terms == before, "no attempt follows: nothing changes"
            break
        assert terms is decider.terms
        assert now < DEADLINE
        assert terms.avoid >= before.avoid
        assert terms.is_plain >= before.is_plain
        assert 0.0 <= terms.pause_s <= MAX_PAUSE_S
        num_failed += terms.number > before.number
        assert terms.number == 1 + num_failed <= MAX_ATTEMPTS


@given(failures, st.floats(DEADLINE, 1e6))
def test_after_the_deadline_every_error_is_the_end(error: MeshError, now: float) -> None:
    assert failover().decide(error, ENGINES, now) is None


@pytest.mark.parametrize("kind", [InvalidRequest, PromptTooLong, CacheFull, QueueFull, NoEngines])
def test_what_the_mesh_itself_refuses_is_final(kind: type[MeshError]) -> None:
    assert failover().decide(told(kind), ENGINES, 1.0) is None


def test_an_engine_without_room_is_asked_once() -> None:
    decider = failover()
    for engine in ENGINES:
        terms = decider.decide(told(CacheFull, reporter=engine), [engine], 1.0)
        assert terms is not None
        assert engine in terms.avoid
        assert (terms.number, terms.pause_s) == (1, 0.0)
    assert decider.decide(told(CacheFull, reporter="a"), ["a"], 1.0) is None


@pytest.mark.parametrize("engines", [["a", "a"], ["a", "b"]])
def test_who_is_refused_a_grant_twice_is_served_by_one_engine_alone(engines: list[str]) -> None:
    """A writer that is silent keeps its grants; a generation needs none."""
    decider = failover()
    plain = []
    for engine in engines:
        terms = decider.decide(told(GrantsFull, reporter=engine), [engine], 1.0)
        assert terms is not None
        plain.append(terms.is_plain)
    assert plain == [False, True]
    assert decider.decide(told(GrantsFull, reporter="a"), ["a"], 1.0) is None


def test_full_engines_are_waited_for_only_after_one_has_failed_and_only_for_so_long() -> None:
    decider = failover()
    assert decider.decide(told(EngineLost, suspect="a"), ["a"], 1.0) is not None
    assert decider.decide(told(NoEngines), [], 1.0 + PATIENCE_S) is not None
    assert decider.decide(told(NoEngines), [], 1.1 + PATIENCE_S) is None


def test_whoever_reports_a_failure_is_not_suspected() -> None:
    terms = failover().decide(told(PeerError, reporter="a"), ["a", "b"], 1.0)
    assert terms is not None
    assert terms.avoid == {"b"}


def test_the_last_attempt_after_failed_sends_sends_nothing() -> None:
    decider = failover()
    plain = []
    while (terms := decider.decide(told(TransferFailed), ENGINES, 1.0)) is not None:
        plain.append(terms.is_plain)
    assert plain == [False] * (MAX_ATTEMPTS - 2) + [True]


def test_a_mistake_of_the_strategy_leads_to_plain_service_once() -> None:
    decider = failover()
    terms = decider.decide(told(StrategyError), ENGINES, 1.0)
    assert terms is not None
    assert terms.is_plain
    assert decider.decide(told(StrategyError), ENGINES, 1.0) is None


def test_who_wants_to_be_told_of_the_prompt_is_served_by_one_engine_alone_from_the_first() -> None:
    scored = SamplingParams(max_tokens=8, prompt_logprobs=0)
    decider = Failover(Request("r", [1, 2, 3], scored, DEADLINE, 16), patience_s=PATIENCE_S)
    assert decider.terms.is_plain and decider.alone == "prompt_logprobs"
    assert decider.decide(told(EngineLost, suspect="a"), ["a"], 1.0) is not None
    assert decider.terms.is_plain and decider.alone == "prompt_logprobs"
    other = failover()
    assert other.alone == ""
    other.decide(told(StrategyError), [], 1.0)
    assert other.alone == "strategy_error"
