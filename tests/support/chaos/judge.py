"""Was every answer right, and every failure owed to a fault? Pure: outcomes and faults in, a verdict out.

Each *attempt* is judged, also those that a later one made good: its tokens must be the oracle's as far as it
came, and if it failed then with a code that says "try again" and for a fault that explains that code.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field

from microserve.gateway.routers.link import RouterLost
from microserve.protocol.errors import DeadlineExceeded, NoEngines
from tests.support.chaos.cases import Question
from tests.support.chaos.client import HTTP_LOST, NO_OUTCOME, Attempt
from tests.support.chaos.faults import Fault
from tests.support.chaos.load import CAPACITY, RETRYABLE, Outcome

ECHO_S = 3.0
"""What a fault breaks may come to light so long after it, beside the silence that is allowed."""
PATIENCE_S = 10.0
"""A stream that stood still for so long at its deadline hung, whatever else was going on."""
UNMEASURED = frozenset({"cut", "starved"})
"""They take no engine away."""
LATE_S = 0.5
"""Tokens that were on their way when the fault struck come within this."""


@dataclass
class Verdict:
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    """Each breaks a promise."""
    recovery_s: dict[str, list[tuple[float, bool]]] = field(default_factory=dict)
    """By kind of fault and of service: from the fault to the next token of what was on the victim, or from
    its own start for what was sent there before the fault was noticed; and whether no other one was near."""


class Judge:
    def __init__(
        self, questions: list[Question], faults: list[Fault], engines: list[str], *, silence_s: float
    ) -> None:
        """``silence_s``: how long a dead peer may go unnoticed."""
        self._questions = questions
        self._faults = faults
        self._engines = engines
        self._after_s = silence_s + ECHO_S

    def judge(self, outcomes: list[Outcome], continued: set[str]) -> Verdict:
        verdict = Verdict()
        for outcome in outcomes:
            verdict.counts["requests"] += 1
            verdict.counts["retried"] += len(outcome.attempts) > 1
            question = self._questions[outcome.plan.question]
            flaws = [flaw for attempt in outcome.attempts for flaw in self._flaws(attempt, outcome, question)]
            for kind, text in flaws:
                verdict.counts[kind] += 1
                verdict.problems.append(f"{kind}: {outcome.last.request_id} ({outcome.plan.strategy}) {text}")
            verdict.counts[_end_of(outcome, bool(flaws))] += 1
        self._measure(outcomes, continued, verdict)
        return verdict

    def _flaws(self, attempt: Attempt, outcome: Outcome, question: Question) -> list[tuple[str, str]]:
        flaws = [("wrong", text) for text in attempt.violations]
        expected = list(question.tokens)
        if attempt.tokens != expected[: len(attempt.tokens)]:
            pairs = enumerate(zip(attempt.tokens, expected, strict=False))
            first = next((i for i, (a, b) in pairs if a != b), len(expected))
            flaws.append(("wrong", f"token {first} of {len(expected)} differs, engines {attempt.engines}"))
        if not question.text.startswith(attempt.text.rstrip("\N{REPLACEMENT CHARACTER}")):
            flaws.append(("wrong", "the text differs"))
        if attempt.completed:
            if attempt.num_tokens != len(expected):
                flaws.append(("wrong", f"ended after {attempt.num_tokens} of {len(expected)} tokens"))
            elif attempt.door == "gateway" and attempt.text != question.text and not flaws:
                flaws.append(("wrong", "the text is cut short"))
        elif attempt.code == NO_OUTCOME:
            flaws.append(("stuck", f"at {attempt.door}: {attempt.detail}"))
        elif attempt.reason == "error" and not self._explained(attempt):
            flaws.append(("unexplained", f"at {attempt.door}: {attempt.code}: {attempt.detail}"))
        elif attempt.reason == "abort" and not outcome.cancelled:
            flaws.append(("unexplained", f"at {attempt.door}: aborted, and nobody cancelled it"))
        return flaws

    # --- which fault explains a failure --------------------------------------------------------------

    def _explained(self, attempt: Attempt) -> bool:
        code = attempt.code
        if code not in RETRYABLE:
            return False
        near = [f for f in self._faults if f.at <= attempt.ended_at <= f.until + self._after_s]
        by_gateway = attempt.door == "gateway"
        routers = {v for fault in near for v in fault.victims if v.startswith("router")}
        if not by_gateway:
            routers &= {attempt.door}
        if code == HTTP_LOST:
            return any(_breaks(fault, {"gateway"}, {"client"}) for fault in near)
        if code == RouterLost.code:
            return any(_breaks(fault, routers, {attempt.door if by_gateway else "client"}) for fault in near)
        if code == DeadlineExceeded.code:
            return self._was_slow(attempt)
        if code in CAPACITY and routers:
            return True  # a new life of a router has to find the engines first
        if code in CAPACITY - {NoEngines.code}:
            return self._num_down(attempt) > 0
        return self._num_down(attempt) == len(self._engines)

    def _was_slow(self, attempt: Attempt) -> bool:
        """Tokens came to the end, or there was no time for any, while faults left fewer engines."""
        began = attempt.arrivals[-1] if attempt.arrivals else attempt.started_at
        return attempt.ended_at - began < PATIENCE_S and self._num_down(attempt) > 0

    def _num_down(self, attempt: Attempt) -> int:
        """Engines that were down at the worst moment of the attempt."""
        moments = [f.at for f in self._faults if attempt.started_at <= f.at <= attempt.ended_at]
        return max(
            sum(self._was_down(engine, moment) for engine in self._engines)
            for moment in (attempt.started_at, *moments)
        )

    def _was_down(self, engine: str, moment: float) -> bool:
        return any(
            engine in fault.victims
            and fault.kind not in UNMEASURED
            and fault.at <= moment <= fault.until + ECHO_S
            for fault in self._faults
        )

    # --- how long it took ----------------------------------------------------------------------------

    def _measure(self, outcomes: list[Outcome], continued: set[str], verdict: Verdict) -> None:
        for fault in self._faults:
            if fault.kind in UNMEASURED:
                continue
            waits = [wait for each in outcomes for wait in _waits(fault, each, continued)]
            kind = f"{fault.kind} {fault.victims[0].partition('-')[0]}"
            found = verdict.recovery_s.setdefault(kind, [])
            found += [(wait, self._is_alone(fault, at, at + wait)) for at, wait in waits]

    def _is_alone(self, fault: Fault, since: float, until: float) -> bool:
        return not any(
            other is not fault and other.at <= until and since <= other.until + ECHO_S
            for other in self._faults
            if other.kind not in UNMEASURED | {"blink"} and "index" not in other.victims
        )


def _waits(fault: Fault, outcome: Outcome, continued: set[str]) -> list[tuple[float, float]]:
    """When the request began to wait for the victim, and for how long it got no token."""
    victim, waits = fault.victims[0], []
    for number, attempt in enumerate(outcome.attempts):
        # One that came to the victim before its fault was noticed has waited as well.
        if not (attempt.started_at < fault.until and fault.at < attempt.ended_at):
            continue
        at = max(fault.at, attempt.started_at)
        if victim in attempt.engines and attempt.request_id in continued:
            waits += [(at, wait) for wait in next_token_s(attempt.arrivals, at)]
        elif attempt.door == victim and attempt.code:
            later = [arrival for other in outcome.attempts[number + 1 :] for arrival in other.arrivals]
            waits += [(at, min(later) - at)] if later else []
    return waits


def _breaks(fault: Fault, servers: set[str], clients: set[str]) -> bool:
    """Does it end the connections between them? A cut does so only if it has both ends."""
    victims = set(fault.victims)
    if fault.kind == "cut":
        return bool(victims & servers and victims & clients)
    return bool(victims & (servers | clients))


def next_token_s(arrivals: list[float], at: float) -> list[float]:
    """From a fault to the next token that was not yet on its way: one number, or none."""
    points = [at, *(arrival for arrival in arrivals if arrival > at)]
    gaps = [(b - a, b - at) for a, b in itertools.pairwise(points) if a <= at + LATE_S]
    return [max(gaps)[1]] if gaps else []


def _end_of(outcome: Outcome, flawed: bool) -> str:
    if outcome.cancelled and outcome.last.reason == "abort":
        return "cancelled"
    if outcome.last.completed:
        return "completed"
    return "failed, flawed" if flawed else "failed, explained"
