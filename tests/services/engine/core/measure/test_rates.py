"""Measured rates: whole first samples, no decay to nonsense, and what routers are told of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Batch, Chunk, ScoreSpec, StepResult
from microserve.services.engine.core.measure.rates import MAX_DECODE_JUMP, Rates
from microserve.services.engine.core.measure.share import SHARE_S
from microserve.services.engine.core.scheduler import Step
from tests.support.engine.core_mesh import Mesh, generate, grant_for, prompt_of, receive, send


def step(
    rates: Rates,
    now: float,
    elapsed_s: float,
    *,
    prefill: int = 0,
    decodes: int = 0,
    score: ScoreSpec | None = None,
) -> float:
    """One step of so many tokens; when it ends."""
    chunks = [Chunk(0, [1], 0, [0], 0, None) for _ in range(decodes)]
    if prefill:
        chunks.append(Chunk(1, [1] * prefill, 0, [0], 0, None, score))
    step = Step(Batch(chunks), [], num_decodes=decodes, started_at=now)
    rates.measure(step, now + elapsed_s)
    return now + elapsed_s


def test_nothing_is_known_before_the_first_step() -> None:
    rates = Rates()
    assert (rates.prefill_tokens_per_s, rates.decode_step_s, rates.mean_output_tokens) == (0.0, 0.0, 0.0)
    assert rates.prefill_rate_age_s(1000.0) == 0.0


def test_the_first_sample_is_taken_whole() -> None:
    rates = Rates()
    now = step(rates, 100.0, 0.5, prefill=500)
    assert rates.prefill_tokens_per_s == pytest.approx(1000.0)
    now = step(rates, now, 0.02, decodes=4)
    assert rates.decode_step_s == pytest.approx(0.02)
    assert rates.prefill_rate_age_s(now + 1.0) == pytest.approx(1.02)


def test_steps_that_make_logits_for_their_prompts_do_not_pull_the_rate_down() -> None:
    """They say how fast a prompt is at least; the first one is better than nothing."""
    rates = Rates()
    now = step(rates, 100.0, 1.0, prefill=500, score=ScoreSpec(0, [1], 5))
    assert rates.prefill_tokens_per_s == pytest.approx(500.0)
    now = step(rates, now, 0.25, prefill=500)
    known = rates.prefill_tokens_per_s
    assert known > 500.0
    step(rates, now, 1.0, prefill=500, score=ScoreSpec(0, [1], 5))
    assert rates.prefill_tokens_per_s == known


def test_decode_tokens_are_no_prefill() -> None:
    rates = Rates()
    step(rates, 100.0, 0.5, prefill=300, decodes=200)
    assert rates.prefill_tokens_per_s == pytest.approx(600.0)


def test_nearly_empty_steps_do_not_pull_the_rate_down_nor_keep_it_fresh() -> None:
    rates = Rates()
    now = step(rates, 100.0, 0.5, prefill=500)
    for _ in range(100):
        now = step(rates, now, 0.02, prefill=2)
    assert rates.prefill_tokens_per_s == pytest.approx(1000.0)
    assert rates.prefill_rate_age_s(now) == pytest.approx(2.0)
    step(rates, now, 0.001, prefill=2)  # faster than thought: that is news
    assert 1000.0 < rates.prefill_tokens_per_s < 2000.0


def test_a_much_fuller_step_begins_anew() -> None:
    rates = Rates()
    now = step(rates, 100.0, 0.02, prefill=2)
    assert rates.prefill_tokens_per_s == pytest.approx(100.0)
    step(rates, now, 0.5, prefill=500)
    assert rates.prefill_tokens_per_s == pytest.approx(1000.0)


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 512), st.integers(0, 64), st.floats(1e-4, 5.0)), min_size=1, max_size=60
    )
)
def test_rates_stay_between_the_slowest_and_the_fastest_sample(
    steps: list[tuple[int, int, float]],
) -> None:
    rates, now = Rates(), 100.0
    prefills = [prefill / elapsed for prefill, decodes, elapsed in steps if prefill > decodes]
    decodes_s = [elapsed for prefill, decodes, elapsed in steps if decodes and not prefill]
    for prefill, decodes, elapsed in steps:
        now = step(rates, now, elapsed, prefill=prefill, decodes=decodes)
    for value, samples in ((rates.prefill_tokens_per_s, prefills), (rates.decode_step_s, decodes_s)):
        if samples:
            assert min(samples) * 0.999 <= value <= max(samples) * 1.001
        else:
            assert value == 0.0


def test_a_rate_follows_a_lasting_change() -> None:
    rates, now = Rates(), 100.0
    for seconds in (0.1, 1.0):
        for _ in range(30):
            now = step(rates, now, seconds, prefill=500)
            now = step(rates, now, seconds / 10, decodes=8)
        assert rates.prefill_tokens_per_s == pytest.approx(500 / seconds, rel=0.02)
        assert rates.decode_step_s == pytest.approx(seconds / 10, rel=0.02)


def test_a_step_that_was_frozen_counts_for_little() -> None:
    rates, now = Rates(), 100.0
    for seconds in (0.02, 0.02, 60.0):
        now = step(rates, now, seconds, decodes=8)
    assert rates.decode_step_s < 0.02 * MAX_DECODE_JUMP


def test_a_step_without_time_is_no_sample() -> None:
    rates = Rates()
    step(rates, 100.0, 0.0, prefill=500)
    step(rates, 100.0, 0.0, decodes=5)
    assert (rates.prefill_tokens_per_s, rates.decode_step_s) == (0.0, 0.0)


def test_the_share_of_prefills_is_of_the_last_seconds() -> None:
    rates = Rates()
    assert rates.prefill_share(100.0) == 0.0
    now = 100.0
    for _ in range(100):  # half of each second
        now = step(rates, now, 0.5, prefill=500)
        now = step(rates, now, 0.5, decodes=8)
    assert rates.prefill_share(now) == pytest.approx(0.5, abs=0.05)
    assert rates.prefill_share(now + SHARE_S) == pytest.approx(rates.prefill_share(now) / math.e)
    for _ in range(100):
        now = step(rates, now, 0.5, prefill=20, decodes=8)
    assert rates.prefill_share(now) == pytest.approx(1.0, abs=0.01)


def test_shares_are_of_what_the_time_went_to() -> None:
    rates, now = Rates(), 100.0
    for _ in range(100):
        now = step(rates, now, 0.2, prefill=500)
        now = step(rates, now, 0.3, decodes=8)
        rates.rests(now, awaits_kv=True)
        rates.rests(now + 0.1, awaits_kv=True)
        rates.goes_on(now + 0.2)
        now += 0.2
        rates.rests(now, awaits_kv=False)
        rates.goes_on(now + 0.3)
        now += 0.3
    shares = rates.prefill_share(now), rates.decode_share(now), rates.transfer_share(now)
    assert shares == pytest.approx((0.2, 0.3, 0.2), abs=0.04)
    assert sum(shares) < 1.0
    step(rates, now, 60.0)  # sends of what was computed before
    assert rates.transfer_share(now + 60.0) == pytest.approx(1.0, abs=0.01)


def test_an_engine_says_what_it_gave_and_what_it_waits_for() -> None:
    mesh, prompt = Mesh(), prompt_of(22)
    idle = mesh.b.core.load()
    assert (idle.granted_blocks, idle.oldest_lease_s, idle.idle_share) == (0, 0.0, 1.0)
    granted = grant_for(mesh.b, "r", prompt, 16)
    mesh.now += 2.0
    load = mesh.b.core.load()
    assert load.granted_blocks == len(granted.grant.blocks) > 0
    assert load.oldest_lease_s == pytest.approx(2.0)
    assert load.transfer_share == 0.0, "nobody waits for it yet"
    receive(mesh.b, "r", granted, 16)
    for _ in range(2):
        assert not mesh.b.core.step()
        mesh.now += SHARE_S
    assert not mesh.b.core.step()
    load = mesh.b.core.load()
    assert load.transfer_share == pytest.approx(1.0 - math.exp(-2.0))
    assert load.idle_share == pytest.approx(math.exp(-2.0))
    send(mesh.a, "r", prompt, granted, 0, 16)
    mesh.run()
    assert len(mesh.b.tokens["r"]) > 0
    load = mesh.b.core.load()
    assert (load.granted_blocks, load.oldest_lease_s) == (0, 0.0)
    mesh.close()


def test_an_engine_says_what_it_has_measured() -> None:
    mesh = Mesh(max_num_seqs=3)
    engine, execute = mesh.a, mesh.a.runner.execute

    def timed(batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult:
        mesh.now += 0.001 * sum(len(chunk.token_ids) for chunk in batch.chunks)
        return execute(batch, on_layer)

    engine.runner.execute = timed  # type: ignore[method-assign]
    assert engine.core.load().prefill_rate_age_s == 0.0
    for length in (4, 8):
        params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
        generate(engine, f"r{length}", prompt_of(16, length), params)
    mesh.run()
    load = engine.core.load()
    assert load.max_num_seqs == 3
    assert load.prefill_tokens_per_s == pytest.approx(1000.0, rel=0.02)
    assert 0.001 <= load.decode_step_s <= 0.002
    assert 4 <= load.mean_output_tokens <= 8
    assert load.max_num_batched_tokens == mesh.a.core.state.scheduler._max_num_batched_tokens
    assert 0.0 < load.prefill_share < 0.04 / SHARE_S
    mesh.now += 5.0
    assert engine.core.load().prefill_rate_age_s > 5.0
    mesh.close()
