"""SIGSTOP of an engine past its liveness and lease, then SIGCONT.

Its streams go on elsewhere with the same tokens; thawed, it is fenced from what it had and serves again.
"""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
import time
from pathlib import Path

import pytest

from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.settings.settings import BusSettings
from tests.support.chaos.cases import Question, ask_oracle, keep_stable
from tests.support.chaos.client import Attempt, Doors, open_doors
from tests.support.chaos.judge import next_token_s
from tests.support.chaos.mesh import ChaosMesh
from tests.support.process.cases import Case
from tests.support.process.exactness import STRATEGIES

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

LEASE_S = 2.0
BUS = BusSettings(heartbeat_interval_s=0.25)
FROZEN_S = LEASE_S + BUS.heartbeat_interval_s * BUS.liveness + 1.0
IN_FLIGHT = 18
TTL_S = 60.0
LABELS = {0: "prefill", 1: "decode"}
"""The third engine serves both, so that there is an elsewhere."""


def make_cases() -> list[Case]:
    """Long prompts and answers, sampled and greedy: while some decode, others are sent."""
    rng = random.Random(7)
    return [
        Case(
            tuple(rng.randrange(20, 250) for _ in range(rng.randrange(100, 1200))),
            SamplingParams(max_tokens=250, temperature=number % 2, seed=number, ignore_eos=True),
        )
        for number in range(2 * IN_FLIGHT)
    ]


@pytest.mark.heavy
@pytest.mark.parametrize("victim", ["engine-0", "engine-1"])
def test_frozen_and_thawed(
    victim: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh = ChaosMesh(
        tiny_model,
        tmp_path,
        num_engines=3,
        settings=[
            f"kvcache.lease_s={LEASE_S}",
            f"bus.heartbeat_interval_s={BUS.heartbeat_interval_s}",
            "engine.max_num_batched_tokens=128",
            "model.dtype=float32",  # as the oracle
        ],
        engine_settings={number: [f'engine.labels=["{label}"]'] for number, label in LABELS.items()},
    )
    with mesh:
        waits = asyncio.run(_freeze(mesh, victim))
    side = LABELS[int(victim[-1])]
    with capsys.disabled():
        print(
            f"\nfreeze of the {side} engine: {len(waits)} streams were there, recovery median "
            f"{statistics.median(waits):.2f} s, worst {max(waits):.2f} s"
        )


async def _freeze(mesh: ChaosMesh, victim: str) -> list[float]:
    """Seconds from the freeze to the next token of each stream that had a part on the victim."""
    bus = ZmqBus(linger_s=0.1)
    try:
        known = await ask_oracle(bus, mesh.services["engine-2"].address, make_cases(), mesh.model)
        questions = keep_stable(known, mesh.model)[:IN_FLIGHT]
        assert len(questions) == IN_FLIGHT
        cases = [question.case for question in questions]
        async with open_doors(bus, mesh, BUS) as doors:
            await doors.wait_engines(3)
            attempts = start_all(doors, questions, "a")
            await some_have_grown(attempts)
            frozen_at = time.monotonic()
            mesh.send_signal(victim, signal.SIGSTOP)
            await all_exact(attempts, questions)
            # The length of the fault itself: beyond every patience that anybody has with the victim.
            await asyncio.sleep(max(0.0, frozen_at + FROZEN_S - time.monotonic()))
            # What it still had to say and to write comes amid new requests.
            others = start_all(doors, questions, "b")
            await some_have_grown(others)
            mesh.send_signal(victim, signal.SIGCONT)
            await all_exact(others, questions)
            await doors.wait_engines(3)
            for name in mesh.alive("engine"):
                assert await mesh.wait_whole(bus, name) == "", name
            # From its own cache, without a router in between; then all strategies with it among them.
            again = await ask_oracle(bus, mesh.services[victim].address, cases, mesh.model, salt="")
            assert [question.tokens for question in again] == [question.tokens for question in questions]
            later = start_all(doors, questions, "c")
            await all_exact(later, questions)
            assert any(victim in attempt.engines for attempt in later), "it serves no more"
            for name in mesh.alive("engine"):
                assert await mesh.wait_whole(bus, name) == "", name
        waits = [
            wait
            for attempt in attempts
            if victim in attempt.engines and attempt.ended_at > frozen_at
            for wait in next_token_s(attempt.arrivals, frozen_at)
        ]
        assert waits, "nothing ran there when it froze"
        return waits
    finally:
        bus.close()


def start_all(doors: Doors, questions: list[Question], name: str) -> list[Attempt]:
    """Every question, under all strategies in turn."""
    attempts = []
    for number, question in enumerate(questions):
        attempt = Attempt(f"{name}{number}", "router", time.monotonic())
        strategy = STRATEGIES[number % len(STRATEGIES)]
        doors.start(attempt, question.case, strategy=strategy, ttl_s=TTL_S, salt="")
        attempts.append(attempt)
    return attempts


async def some_have_grown(attempts: list[Attempt]) -> None:
    """A third of the streams have begun; the others are queued, computed or sent."""
    async with asyncio.timeout(TTL_S):
        for done in asyncio.as_completed([attempt.grown.wait() for attempt in attempts]):
            await done
            if sum(bool(attempt.tokens) for attempt in attempts) >= len(attempts) // 3:
                return


async def all_exact(attempts: list[Attempt], questions: list[Question]) -> None:
    async with asyncio.timeout(TTL_S):
        for attempt in attempts:
            await attempt.done.wait()
    for attempt, question in zip(attempts, questions, strict=True):
        assert attempt.reason == "length", (attempt.code, attempt.detail)
        assert not attempt.violations
        assert tuple(attempt.tokens) == question.tokens
