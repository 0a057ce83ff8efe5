"""A real engine core offered three times what it can do, in virtual time, behind predictions alone.

What is let in gets its first token in time, what is not is told when to come again, and two seconds after the
load has fallen everything is let in again.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from microserve.protocol.messages.engine import EngineLoad
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Batch, StepResult
from microserve.services.router.engines.load import Account, LoadBook
from microserve.services.router.engines.prediction import EngineView, predicted_ttft_s
from tests.support.engine.core_mesh import Engine, Mesh, generate, prompt_of

pytestmark = pytest.mark.slow

BEAT_S = 0.5
STEP_S, TOKEN_S = 0.005, 0.0005
"""What a step costs, and each of its tokens."""
BOUND_S = 2.0


class Desk:
    """One engine, the book of its router, and a gateway's worth of clients in virtual time."""

    def __init__(self, seed: int, **options: int) -> None:
        self.mesh = Mesh(max_num_batched_tokens=64, num_blocks=512, max_waiting=10_000, **options)
        self.engine: Engine = self.mesh.a
        self.book = LoadBook()
        self.rng = random.Random(seed)
        self.report, self.report_at = EngineLoad(), 0.0
        self.is_silent = False
        """No heartbeat comes."""
        self.ttfts: list[float] = []
        self.excesses: list[float] = []
        self._live: dict[str, tuple[float, Account]] = {}
        self._ids = 0
        execute = self.engine.runner.execute

        def timed(batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult:
            self.mesh.now += STEP_S + TOKEN_S * sum(len(chunk.token_ids) for chunk in batch.chunks)
            return execute(batch, on_layer)

        self.engine.runner.execute = timed  # type: ignore[method-assign]

    def predicted_s(self, num_tokens: int) -> float:
        view = EngineView(self.report, self.mesh.now - self.report_at, self.book.own("a"), 4, 512)
        return predicted_ttft_s(view, num_tokens)

    def offer(self, num_tokens: int, max_tokens: int, arrived_at: float) -> bool:
        """Was it let in?"""
        predicted = self.predicted_s(num_tokens)
        if predicted > BOUND_S:
            self.excesses.append(predicted - BOUND_S)
            return False
        self._ids += 1
        request_id = f"r{self._ids}"
        account = self.book.open()
        account.reserve_sequence("a")
        account.reserve_prefill("a", "stream", num_tokens)
        self._live[request_id] = (arrived_at, account)
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        generate(self.engine, request_id, prompt_of(num_tokens, self._ids), params)
        return True

    def turn(self) -> None:
        """One step, or a pause if there is nothing to do; what came of it is booked."""
        if not self.engine.step():
            self.mesh.now += 0.01
        for request_id, (arrived_at, account) in list(self._live.items()):
            if request_id in self.engine.tokens and account.tokens:
                self.ttfts.append(self.mesh.now - arrived_at)
                account.release_prefill("a", "stream")
            if request_id in self.engine.finished:
                account.close()
                del self._live[request_id]
        if not self.is_silent and self.mesh.now - self.report_at >= BEAT_S:
            self.report, self.report_at = self.engine.core.load(), self.mesh.now

    def load_for(self, duration_s: float, rate: float, num_tokens: int, max_tokens: int) -> None:
        """Poisson arrivals."""
        ends, due = self.mesh.now + duration_s, self.mesh.now
        while self.mesh.now < ends:
            while due <= self.mesh.now:
                self.offer(num_tokens, max_tokens, due)
                due += self.rng.expovariate(rate)
            self.turn()

    def run_for(self, duration_s: float) -> None:
        ends = self.mesh.now + duration_s
        while self.mesh.now < ends:
            self.turn()

    def close(self) -> None:
        while self._live:
            self.turn()
        assert self.book.is_zero
        self.mesh.close()


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "rate", "options"),
    [
        (60, 2, 75.0, {}),  # prefill is what lacks: 25 or so a second can be done
        (8, 40, 90.0, {"max_num_seqs": 4}),  # places are what lacks: 15 or so a second
    ],
    ids=["prefill", "places"],
)
def test_three_times_too_much(num_tokens: int, max_tokens: int, rate: float, options: dict[str, int]) -> None:
    desk = Desk(1, **options)
    desk.load_for(3.0, rate / 10, num_tokens, max_tokens)  # something has been measured
    desk.ttfts.clear()
    desk.load_for(20.0, rate, num_tokens, max_tokens)
    admitted, refused = len(desk.ttfts), len(desk.excesses)
    late = sorted(desk.ttfts)[int(0.99 * admitted)]
    print(f"{admitted} admitted, first token p99 {late:.2f} s of {BOUND_S} s; {refused} refused")
    assert late <= BOUND_S * 1.5
    assert refused > admitted
    assert min(desk.excesses) > 0.0
    # The engine was never idle for want of what had been refused.
    assert sorted(desk.ttfts)[admitted // 2] > BOUND_S / 4

    desk.run_for(2.0)
    assert desk.offer(num_tokens, max_tokens, desk.mesh.now), "open again two seconds after the load fell"
    desk.close()


def test_a_last_report_of_a_full_engine_does_not_keep_admission_shut() -> None:
    desk = Desk(2)
    desk.load_for(5.0, 75.0, 60, 2)
    foreign = EngineLoad(
        num_running=8, num_waiting=500, queued_prefill_tokens=10**6, prefill_tokens_per_s=1000.0
    )
    desk.run_for(2.5)
    desk.report, desk.report_at = foreign, desk.mesh.now  # another router's work, and then no word
    desk.is_silent = True
    assert not desk.offer(60, 2, desk.mesh.now)
    assert desk.excesses[-1] > 900.0
    desk.run_for(2.0)
    assert desk.offer(60, 2, desk.mesh.now)
    desk.close()


def test_a_rate_from_a_bad_hour_is_measured_again() -> None:
    """Every prompt is longer than the rate allows: without a way through it would be refused for ever."""
    desk = Desk(3)
    desk.load_for(1.0, 10.0, 60, 2)
    desk.run_for(0.5)
    desk.engine.core.stepper.rates.prefill_tokens_per_s = 5.0
    desk.run_for(0.6)
    assert not desk.offer(60, 2, desk.mesh.now)
    desk.run_for(2.0)
    assert desk.offer(60, 2, desk.mesh.now)
    assert not desk.offer(60, 2, desk.mesh.now), "one at a time"
    for _ in range(20):
        desk.run_for(2.0)
        desk.offer(60, 2, desk.mesh.now)
    desk.run_for(0.6)
    assert desk.report.prefill_tokens_per_s > 500.0
    desk.close()
