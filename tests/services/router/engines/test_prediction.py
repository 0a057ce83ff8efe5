"""Predicted time to the first token: what counts in it, and that no refusal outlives its reason."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.messages.engine import EngineLoad
from microserve.services.router.engines.load import Load
from microserve.services.router.engines.prediction import (
    LATER_SHARE,
    RATE_MAX_AGE_S,
    REPORT_MAX_AGE_S,
    EngineView,
    decode_cost_s,
    held_up,
    predicted_ttft_s,
    prefill_cost_s,
    tokens_ahead,
)

IDLE = EngineLoad(free_blocks=1000, prefill_tokens_per_s=1000.0, max_num_seqs=8)
SECONDS = st.floats(0.0, 1e4)
COUNTS = st.integers(0, 10_000)
LOADS = st.builds(
    EngineLoad,
    num_running=COUNTS,
    num_waiting=COUNTS,
    queued_prefill_tokens=st.integers(0, 10**7),
    free_blocks=COUNTS,
    prefill_tokens_per_s=st.one_of(st.just(0.0), st.floats(1e-3, 1e7)),
    decode_step_s=st.floats(0.0, 100.0),
    max_num_seqs=st.integers(0, 512),
    prefill_rate_age_s=SECONDS,
    mean_output_tokens=st.floats(0.0, 1e5),
    prefill_share=st.floats(0.0, 1.0),
    max_num_batched_tokens=st.integers(0, 1 << 16),
)
VIEWS = st.builds(
    EngineView,
    report=LOADS,
    report_age_s=SECONDS,
    own=st.builds(Load, uncached_tokens=st.integers(0, 10**7), sequences=COUNTS),
    block_size=st.sampled_from([1, 16, 64]),
    num_blocks=st.integers(1, 10_000),
    unplaced_tokens=st.floats(0.0, 1e7),
)


def view(
    report: EngineLoad, own: Load | None = None, age_s: float = 0.0, unplaced: float = 0.0
) -> EngineView:
    return EngineView(report, age_s, own or Load(0, 0), 16, 1000, unplaced)


@given(VIEWS, COUNTS, COUNTS)
def test_more_to_compute_never_comes_sooner(view: EngineView, num_tokens: int, more: int) -> None:
    sooner = predicted_ttft_s(view, num_tokens)
    assert 0.0 <= sooner < math.inf
    assert predicted_ttft_s(view, num_tokens + more) >= sooner


@given(VIEWS, COUNTS)
def test_what_nobody_has_measured_refuses_nothing(view: EngineView, num_tokens: int) -> None:
    report = msgspec.structs.replace(view.report, prefill_tokens_per_s=0.0, mean_output_tokens=0.0)
    assert predicted_ttft_s(with_report(view, report), num_tokens) == 0.0


@given(VIEWS, COUNTS)
def test_nothing_of_ours_and_silence_open_admission(view: EngineView, num_tokens: int) -> None:
    """Whatever was said before, two seconds after the last word the prediction is 0."""
    silent = EngineView(view.report, 2.0, Load(0, 0), view.block_size, view.num_blocks)
    assert predicted_ttft_s(silent, num_tokens) == 0.0


@given(VIEWS, st.integers(0, 10**6))
def test_an_idle_engine_opens_within_two_seconds_whatever_its_rate_was(
    seen: EngineView, num_tokens: int
) -> None:
    """Heartbeats go on, and show an engine that has done nothing for two seconds."""
    idle = msgspec.structs.replace(
        seen.report,
        num_running=0,
        num_waiting=0,
        queued_prefill_tokens=0,
        max_num_seqs=max(1, seen.report.max_num_seqs),
        prefill_rate_age_s=2.0,
    )
    assert predicted_ttft_s(view(idle), num_tokens) == 0.0


def with_report(seen: EngineView, report: EngineLoad) -> EngineView:
    return EngineView(
        report, seen.report_age_s, seen.own, seen.block_size, seen.num_blocks, seen.unplaced_tokens
    )


def test_prefill_ahead_and_its_own_at_the_measured_rate() -> None:
    assert predicted_ttft_s(view(IDLE), 500) == pytest.approx(0.5)
    assert predicted_ttft_s(view(IDLE, Load(1500, 2)), 500) == pytest.approx(2.0)
    assert predicted_ttft_s(view(IDLE, unplaced=1000.0), 500) == pytest.approx(1.5)


def test_only_the_share_of_others_counts_of_a_report() -> None:
    """Its number counts what is cached too, and ours again; a whole foreign queue counts whole."""
    busy = msgspec.structs.replace(IDLE, num_running=1, num_waiting=3, queued_prefill_tokens=4000)
    assert tokens_ahead(view(busy)) == 4000
    assert tokens_ahead(view(busy, Load(100, 4))) == 100
    assert tokens_ahead(view(busy, Load(100, 1))) == 100 + 3000
    assert tokens_ahead(view(busy, Load(100, 9))) == 100
    assert tokens_ahead(view(busy, Load(100, 1), age_s=REPORT_MAX_AGE_S + 0.1)) == 100


def test_a_full_batch_costs_decode_steps() -> None:
    full = msgspec.structs.replace(IDLE, num_running=8, decode_step_s=0.05, mean_output_tokens=40.0)
    # 2 s to the end of each of 8: one every quarter of a second.
    assert predicted_ttft_s(view(full), 0) == pytest.approx(0.25)
    assert predicted_ttft_s(view(full, Load(0, 12)), 0) == pytest.approx(5 * 0.25)
    assert predicted_ttft_s(view(full, Load(100, 12)), 100) == pytest.approx(5 * 0.25 + 0.2)
    roomy = msgspec.structs.replace(full, num_running=7)
    assert predicted_ttft_s(view(roomy), 0) == 0.0


def test_too_few_blocks_cost_decode_steps() -> None:
    report = msgspec.structs.replace(
        IDLE, num_running=4, free_blocks=200, decode_step_s=0.05, mean_output_tokens=40.0
    )
    assert predicted_ttft_s(view(report), 3200) == pytest.approx(3.2)
    # 1,600 more tokens are 100 blocks, half of what each running one holds.
    assert predicted_ttft_s(view(report), 4800) == pytest.approx(4.8 + 0.5 * 2.0 / 4)


def test_a_rate_that_nothing_has_measured_lately_lets_one_prompt_through() -> None:
    old = msgspec.structs.replace(IDLE, prefill_tokens_per_s=1.0, prefill_rate_age_s=RATE_MAX_AGE_S)
    assert predicted_ttft_s(view(old), 5000) == 0.0
    assert predicted_ttft_s(view(old, unplaced=5000.0), 5000) == 10_000.0
    assert predicted_ttft_s(view(old, Load(5000, 1)), 5000) == 10_000.0
    fresh = msgspec.structs.replace(old, prefill_rate_age_s=RATE_MAX_AGE_S - 0.5)
    assert predicted_ttft_s(view(fresh), 5000) == 5000.0
    assert predicted_ttft_s(view(fresh, age_s=0.5), 5000) == 0.0


# --- what serving costs ---------------------------------------------------------------------------

PREFILLS = EngineLoad(prefill_tokens_per_s=1000.0, decode_step_s=0.1, max_num_batched_tokens=500)


def load(uncached_tokens: int = 0, sequences: int = 0) -> Load:
    return Load(uncached_tokens, sequences, prefill_tokens_per_s=1000.0, decode_step_s=0.1)


@given(LOADS, st.integers(0, 10**6), st.integers(0, 512), COUNTS, COUNTS)
def test_more_to_compute_never_costs_less(
    report: EngineLoad, waiting: int, sequences: int, num_tokens: int, more: int
) -> None:
    least = prefill_cost_s(load(waiting, sequences), report, num_tokens, 1000.0)
    assert (waiting + num_tokens) / 1000.0 * (1 - 1e-12) <= least < math.inf
    assert prefill_cost_s(load(waiting, sequences), report, num_tokens + more, 1000.0) >= least
    assert prefill_cost_s(load(waiting + more, sequences), report, num_tokens, 1000.0) >= least
    assert 0.0 <= held_up(load(), report) <= 1.0
    assert 0.0 <= decode_cost_s(load(), report) < math.inf


def test_a_prefill_holds_up_the_decodes_beside_it() -> None:
    """A full step takes 0.5 s, of which a decode alone would have taken 0.1."""
    assert held_up(load(), PREFILLS) == pytest.approx(0.8)
    assert prefill_cost_s(load(), PREFILLS, 500, 1000.0) == pytest.approx(0.5)
    assert prefill_cost_s(load(sequences=3), PREFILLS, 500, 1000.0) == pytest.approx(0.5 + 3 * 0.4)
    assert prefill_cost_s(load(uncached_tokens=250), PREFILLS, 500, 1000.0) == pytest.approx(0.75)
    unknown = msgspec.structs.replace(PREFILLS, max_num_batched_tokens=0)
    assert held_up(load(), unknown) == 1.0


def test_prefills_that_will_come_cost_decodes_and_each_other() -> None:
    busy = msgspec.structs.replace(PREFILLS, prefill_share=0.5, mean_output_tokens=30.0)
    idle = msgspec.structs.replace(busy, prefill_share=0.0)
    assert decode_cost_s(load(), idle) == pytest.approx(3.0)
    assert decode_cost_s(load(), busy) == pytest.approx(3.0 / (1 - 0.8 * 0.5))
    assert prefill_cost_s(load(), busy, 500, 1000.0) == pytest.approx(0.5 + LATER_SHARE * 0.5)
