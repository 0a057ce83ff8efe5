"""Outcomes in, figures and the table out; against numpy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.services.command.bench.health import Limits, judge
from microserve.services.command.bench.report import (
    METRICS,
    as_json,
    percentile,
    summarise,
    table,
    tokens_by_second,
)
from microserve.services.command.bench.task import Health, Load, Outcome

times = st.floats(0, 1e4, allow_nan=False)


@st.composite
def outcomes(draw: st.DrawFn) -> Outcome:
    sent_s = draw(times)
    wait_s, tail_s = draw(st.floats(0, 10)), draw(st.floats(0, 1))
    gaps = draw(st.lists(st.floats(0, 2), max_size=5))
    first_s = sent_s + wait_s
    return Outcome(
        number=0,
        due_s=sent_s,
        sent_s=sent_s,
        first_s=first_s,
        end_s=first_s + sum(gaps) + tail_s,
        gaps_s=gaps,
        input_tokens=draw(st.integers(1, 100)),
        output_tokens=len(gaps) + draw(st.integers(1, 3)),
        fault=draw(st.sampled_from(["", "", "http 503", "cut off"])),
    )


@given(st.lists(times, min_size=1, max_size=40), st.floats(0, 100))
def test_percentiles_are_numpy_s(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)


@given(st.lists(outcomes(), max_size=12), st.floats(0, 5000))
def test_figures(every: list[Outcome], bound_ms: float) -> None:
    figures = summarise(every, 0.0, {"ttft": bound_ms})
    good = [each for each in every if not each.fault]
    assert figures.completed == len(good)
    assert figures.failed == len(every) - len(good)
    assert figures.total_output == sum(each.output_tokens for each in good)
    assert figures.duration_s == max((each.end_s for each in every), default=0.0)
    waits = [(each.first_s - each.sent_s) * 1000 for each in good]
    assert figures.num_good == sum(wait <= bound_ms for wait in waits)
    if waits:
        spread = figures.spreads["ttft"]
        assert spread.mean_ms == pytest.approx(float(np.mean(waits)))
        assert spread.std_ms == pytest.approx(float(np.std(waits)), abs=1e-6)
        assert spread.percentile_ms(99) == pytest.approx(float(np.percentile(waits, 99)))
    assert sum(tokens_by_second(good, 0.0)) == pytest.approx(figures.total_output)
    assert 0 <= figures.peak_concurrent <= len(every)
    assert len(table(figures, Load())) >= 12 + 4 * len(METRICS)


def one(number: int, sent_s: float, first_s: float, gap_s: float, tokens: int, fault: str = "") -> Outcome:
    gaps = [gap_s] * (tokens - 1)
    end_s = first_s + gap_s * (tokens - 1)
    return Outcome(number, sent_s, sent_s, first_s, end_s, 0.0, gaps, 10, tokens, fault)


def test_the_table_by_hand() -> None:
    """Two answers of 11 tokens, 1/8 s and 1/4 s apart, sent at 0 s and 1 s; a third has failed."""
    every = [
        one(0, 10.0, 10.5, 0.125, 11),
        one(1, 11.0, 11.25, 0.25, 11),
        one(2, 11.5, 11.6, 0.1, 2, fault="http 503"),
    ]
    load = Load(rate=1.0, concurrency=8)
    figures = summarise(every, 10.0, {"ttft": 400.0, "e2el": 4000.0})
    assert table(figures, load, (99.0,)) == [
        "============ Serving Benchmark Result ============",
        "Successful requests:                     2",
        "Failed requests:                         1",
        "Maximum request concurrency:             8",
        "Request rate configured (RPS):           1.00",
        "Benchmark duration (s):                  3.75",
        "Total input tokens:                      20",
        "Total generated tokens:                  22",
        "Request throughput (req/s):              0.53",
        "Request goodput (req/s):                 0.27",
        "Output token throughput (tok/s):         5.87",
        "Peak output token throughput (tok/s):    10.00",
        "Peak concurrent requests:                3.00",
        "Total token throughput (tok/s):          11.20",
        "---------------Time to First Token----------------",
        "Mean TTFT (ms):                          375.00",
        "Median TTFT (ms):                        375.00",
        "P99 TTFT (ms):                           497.50",
        "-----Time per Output Token (excl. 1st token)------",
        "Mean TPOT (ms):                          187.50",
        "Median TPOT (ms):                        187.50",
        "P99 TPOT (ms):                           248.75",
        "---------------Inter-token Latency----------------",
        "Mean ITL (ms):                           187.50",
        "Median ITL (ms):                         187.50",
        "P99 ITL (ms):                            250.00",
        "----------------End-to-end Latency----------------",
        "Mean E2EL (ms):                          2250.00",
        "Median E2EL (ms):                        2250.00",
        "P99 E2EL (ms):                           2740.00",
        "==================================================",
    ]
    body = as_json(figures, load, every, [])
    assert (body["completed"], body["failed"], body["p99_ttft_ms"]) == (2, 1, pytest.approx(497.5))
    assert [row["fault"] for row in body["requests"]] == ["", "", "http 503"]
    assert body["valid"] is True


def test_nothing_came() -> None:
    figures = summarise([], 5.0, {})
    assert figures.per_s(3) == 0.0
    assert "Mean TTFT (ms):                          0.00" in table(figures, Load())


# --- may it be believed ------------------------------------------------------------------------------


def sent(slip_s: float) -> Outcome:
    return Outcome(0, due_s=1.0, sent_s=1.0 + slip_s)


def test_a_run_with_time_to_spare_is_believed() -> None:
    verdict = judge([Health(10.0, 1.0, [0.001] * 99 + [0.2])], [sent(0.001)] * 200, Limits())
    assert verdict.complaints == []
    assert verdict.cpu_share == pytest.approx(0.1)
    assert verdict.lag_max_ms == pytest.approx(200)


@pytest.mark.parametrize(
    ("healths", "slip_s", "told"),
    [
        ([Health(10.0, 1.0, [0.0] * 90 + [0.05] * 10)], 0.0, "event loop woke 50.0 ms late"),
        ([Health(10.0, 1.0, [0.0]), Health(10.0, 1.0, [0.05])], 0.0, "event loop woke 50.0 ms late"),
        ([Health(10.0, 1.0, [0.0])], 0.3, "sent 300.0 ms later than planned"),
        ([Health(10.0, 1.0, [0.0]), Health(10.0, 9.7, [0.0])], 0.0, "used 97% of a core"),
    ],
)
def test_the_bottleneck_is_told_by_how_much(healths: list[Health], slip_s: float, told: str) -> None:
    [complaint] = judge(healths, [sent(slip_s)], Limits()).complaints
    assert told in complaint


def test_a_moment_says_nothing_of_a_core() -> None:
    assert judge([Health(0.01, 0.01, [])], [sent(0.0)], Limits()).complaints == []


def test_limits_are_the_user_s() -> None:
    healths = [Health(10.0, 1.0, [0.05])]
    assert judge(healths, [sent(0.3)], Limits(lag_ms=60, slip_ms=400)).complaints == []
    assert len(judge(healths, [sent(0.3)], Limits(lag_ms=0, slip_ms=0)).complaints) == 2
