"""A short chaos run on real processes, and proof that its judge sees what it must see."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.chaos.cases import Question
from tests.support.chaos.client import NO_OUTCOME, Attempt
from tests.support.chaos.faults import Fault
from tests.support.chaos.judge import Judge
from tests.support.chaos.load import Outcome, Plan
from tests.support.chaos.run import Chaos, run_chaos
from tests.support.process.cases import Case

SEED = 2


@pytest.mark.heavy
@pytest.mark.system
@pytest.mark.timeout(240)
def test_every_promise_is_kept(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    report = run_chaos(Chaos(tiny_model, seconds=15.0, seed=SEED, rate=8.0), tmp_path)
    with capsys.disabled():
        print(f"\n{report.table()}\n({time.monotonic() - started:.0f} s in all)")
    assert report.problems == []
    assert report.faults
    assert report.verdict.counts["completed"] > 0


QUESTION = Question(Case((1, 2), SamplingParams(max_tokens=3)), (5, 6, 7), "abc")


def attempt_of(
    tokens: list[int],
    reason: str,
    *,
    door: str = "router",
    code: str = "",
    violations: list[str] | None = None,
) -> Attempt:
    attempt = Attempt("c0-0", door, 100.0, tokens=tokens, num_tokens=len(tokens), violations=violations or [])
    attempt.end(reason, code)
    attempt.ended_at = 101.0
    return attempt


@pytest.mark.parametrize(
    ("attempt", "verdict"),
    [
        (attempt_of([5, 6, 7], "length"), None),
        (attempt_of([5, 6, 8], "length"), "wrong"),
        (attempt_of([5, 6], "length"), "wrong"),
        (attempt_of([5, 6, 7, 7], "length"), "wrong"),
        (attempt_of([5, 6, 7], "length", violations=["offset 1, have 2"]), "wrong"),
        (attempt_of([5, 9], "error", code="router_lost"), "wrong"),
        (attempt_of([5], "error", code=NO_OUTCOME), "stuck"),
        (attempt_of([5], "error", code="router_lost"), None),
        (attempt_of([5], "error", code="router_lost", door="router-1"), "unexplained"),
        (attempt_of([5], "error", code="engine_lost"), "unexplained"),
        (attempt_of([5], "error", code="internal"), "unexplained"),
        (attempt_of([5], "abort"), "unexplained"),
    ],
)
def test_the_judge_bites(attempt: Attempt, verdict: str | None) -> None:
    faults = [Fault("kill", ("router",), 100.5, 102.0)]
    judge = Judge([QUESTION], faults, ["engine-0"], silence_s=3.0)
    outcome = Outcome(Plan(0, 0.0, 0, attempt.door, "auto", None), 100.0, [attempt])
    counts = judge.judge([outcome], set()).counts
    found = {kind for kind in ("wrong", "stuck", "unexplained") if counts[kind]}
    assert found == ({verdict} if verdict else set())


def test_no_engine_explains_what_one_engine_less_does_not() -> None:
    attempt = attempt_of([], "error", code="no_engines")
    outcome = Outcome(Plan(0, 0.0, 0, "router", "auto", None), 100.0, [attempt])
    first, second = Fault("kill", ("engine-0",), 99.0, 103.0), Fault("freeze", ("engine-1",), 100.2, 105.0)
    for faults, num_unexplained in (([first], 1), ([first, second], 0)):
        judge = Judge([QUESTION], faults, ["engine-0", "engine-1"], silence_s=3.0)
        assert judge.judge([outcome], set()).counts["unexplained"] == num_unexplained
