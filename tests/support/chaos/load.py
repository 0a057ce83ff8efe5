"""Poisson load by seed: who asks what and when, and a client that tries again where a gateway's client would.

A request ends in one :class:`Outcome` with every attempt that was made; whether that is right is judged
elsewhere (judge.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from dataclasses import dataclass, field

from microserve.gateway.routers.link import RouterLost
from microserve.protocol.errors import CapacityError, MeshError, PeerError
from tests.support.chaos.cases import Question
from tests.support.chaos.client import HTTP_LOST, NO_OUTCOME, Attempt, Doors
from tests.support.process.exactness import STRATEGIES

TTL_S = 30.0
GRACE_S = 5.0
"""After its time, a request must have its outcome within this."""
CANCEL_S = 5.0
"""A cancelled request must be over within this."""
MAX_PAUSE_S = 0.5
SHARE_HTTP = 0.25
SHARE_CANCELLED = 0.08


def _codes(base: type[MeshError]) -> set[str]:
    return {base.code}.union(*map(_codes, base.__subclasses__()))


CAPACITY = frozenset(_codes(CapacityError))
RETRYABLE = CAPACITY | _codes(PeerError) | {HTTP_LOST}


@dataclass(frozen=True)
class Plan:
    """One request of the load, all of it by seed."""

    number: int
    at_s: float
    """After the start of the load."""
    question: int
    door: str
    strategy: str
    cancel_after: int | None
    """Cancel once this many tokens have come."""


@dataclass
class Outcome:
    plan: Plan
    started_at: float
    attempts: list[Attempt] = field(default_factory=list)
    cancelled: bool = False
    ended_at: float = 0.0

    @property
    def last(self) -> Attempt:
        return self.attempts[-1]


def plan_load(seconds: float, rate: float, seed: int, num_questions: int, routers: list[str]) -> list[Plan]:
    """``rate``: arrivals a second, on average."""
    rng = random.Random(f"load {seed}")
    plans: list[Plan] = []
    at_s = rng.expovariate(rate)
    while at_s < seconds:
        by_http = rng.random() < SHARE_HTTP
        cancelled = not by_http and rng.random() < SHARE_CANCELLED
        plans.append(
            Plan(
                number=len(plans),
                at_s=at_s,
                question=rng.randrange(num_questions),
                door="gateway" if by_http else rng.choice(routers),
                strategy=rng.choice(STRATEGIES),
                cancel_after=rng.randrange(20) if cancelled else None,
            )
        )
        at_s += rng.expovariate(rate)
    return plans


class Load:
    """Runs plans against a mesh; ``outcomes`` has every request, ended or not."""

    def __init__(self, doors: Doors, questions: list[Question], routers: list[str]) -> None:
        self.outcomes: list[Outcome] = []
        self._doors = doors
        self._questions = questions
        self._routers = routers

    async def run(self, plans: list[Plan]) -> None:
        """Returns when every request has its outcome, or has shown that it gets none."""
        started_at = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for plan in plans:
                await asyncio.sleep(max(0.0, started_at + plan.at_s - time.monotonic()))
                tasks.create_task(self.ask(plan))

    async def ask(self, plan: Plan) -> Outcome:
        outcome = Outcome(plan, time.monotonic())
        self.outcomes.append(outcome)
        deadline = outcome.started_at + TTL_S
        door, pause_s = plan.door, 0.05
        while True:
            door = await self._usable(door, deadline)
            attempt = Attempt(f"c{plan.number}-{len(outcome.attempts)}", door, time.monotonic())
            outcome.attempts.append(attempt)
            await self._attempt(outcome, attempt, deadline)
            retryable = attempt.reason == "error" and attempt.code in RETRYABLE
            # A stream that had begun is tried anew only where its router or gateway was lost, as users would.
            unseen = not attempt.arrivals or attempt.code in (HTTP_LOST, RouterLost.code)
            if not (retryable and unseen) or time.monotonic() + pause_s >= deadline:
                break
            await asyncio.sleep(min(max(pause_s, attempt.retry_after_s), MAX_PAUSE_S))
            pause_s = min(pause_s * 2, MAX_PAUSE_S)
            if door in self._routers:
                door = next(other for other in self._routers if other != door)
        outcome.ended_at = time.monotonic()
        return outcome

    async def _usable(self, door: str, deadline: float) -> str:
        """The door itself, or another router while it is unusable, or after the deadline the door anyway."""
        while time.monotonic() < deadline:
            if self._doors.usable(door):
                return door
            other = next((name for name in self._routers if self._doors.usable(name)), None)
            if other is not None:
                return other
            await asyncio.sleep(0.05)
        return door

    async def _attempt(self, outcome: Outcome, attempt: Attempt, deadline: float) -> None:
        question, plan = self._questions[outcome.plan.question], outcome.plan
        ttl_s = max(0.1, deadline - time.monotonic())
        limit_s = ttl_s + GRACE_S
        if attempt.door == "gateway":
            try:
                async with asyncio.timeout(limit_s):
                    await self._doors.stream(attempt, question.case, strategy=plan.strategy)
            except TimeoutError:
                attempt.end("error", NO_OUTCOME, f"nothing for {limit_s:.0f} s")
            return
        self._doors.start(attempt, question.case, strategy=plan.strategy, ttl_s=ttl_s, salt="")
        cancelling = None
        if plan.cancel_after is not None:
            cancelling = asyncio.create_task(self._cancel_midway(outcome, attempt, plan.cancel_after))
        try:
            async with asyncio.timeout(limit_s) as limit:
                if cancelling is not None:
                    await cancelling
                    if outcome.cancelled:
                        limit.reschedule(asyncio.get_running_loop().time() + CANCEL_S)
                await attempt.done.wait()
        except TimeoutError:
            attempt.end("error", NO_OUTCOME, f"no end; {len(attempt.tokens)} tokens came")
            self._doors.cancel(attempt)
            self._doors.forget(attempt)
        finally:
            if cancelling is not None:
                cancelling.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await cancelling

    async def _cancel_midway(self, outcome: Outcome, attempt: Attempt, num_tokens: int) -> None:
        while len(attempt.tokens) < num_tokens and not attempt.done.is_set():
            attempt.grown.clear()
            await attempt.grown.wait()
        if not attempt.done.is_set():
            outcome.cancelled = True
            self._doors.cancel(attempt)
