"""The figures of a run: outcomes in; a table, and JSON, out. Pure.

The table has the names, the order and the meaning of what ``vllm bench serve`` prints, so that figures can be
laid side by side: TPOT is (end - first) / (tokens - 1) of each answer with more than one token, ITL the gap
between chunks, throughput all tokens by the time from the beginning to the last answer's end. Failed requests
are in none of these but the count of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from microserve.services.command.bench.task import Load, Outcome

WIDTH = 50
KEPT = (50.0, 90.0, 95.0, 99.0)
"""Percentiles in JSON, whatever is printed."""
METRICS = (
    ("ttft", "TTFT", "Time to First Token"),
    ("tpot", "TPOT", "Time per Output Token (excl. 1st token)"),
    ("itl", "ITL", "Inter-token Latency"),
    ("e2el", "E2EL", "End-to-end Latency"),
)
SLO_METRICS = ("ttft", "tpot", "e2el")
"""What a single request can be held to."""


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest ranks, as numpy's default; 0 of nothing."""
    if not values:
        return 0.0
    ranked = sorted(values)
    place = (len(ranked) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one metric, in ms."""

    values_ms: list[float]
    """In order of size."""

    @property
    def mean_ms(self) -> float:
        return math.fsum(self.values_ms) / len(self.values_ms) if self.values_ms else 0.0

    @property
    def std_ms(self) -> float:
        mean = self.mean_ms
        squares = math.fsum((value - mean) ** 2 for value in self.values_ms)
        return math.sqrt(squares / len(self.values_ms)) if self.values_ms else 0.0

    def percentile_ms(self, percent: float) -> float:
        return percentile(self.values_ms, percent)


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds, tokens, and ms where it says so."""

    completed: int
    failures: dict[str, int]
    """By kind."""
    examples: dict[str, str]
    """What the first of each kind said."""
    duration_s: float
    total_input: int
    total_output: int
    num_good: int | None
    """Requests within the objectives; None where there are none."""
    peak_output_tokens_per_s: float
    peak_concurrent: int
    held_s: float
    """Mean time for which ``concurrency`` held a request back."""
    spreads: dict[str, Spread]

    @property
    def failed(self) -> int:
        return sum(self.failures.values())

    def per_s(self, amount: float) -> float:
        return amount / self.duration_s if self.duration_s > 0 else 0.0


def ttft_s(outcome: Outcome) -> float:
    return outcome.first_s - outcome.sent_s


def e2el_s(outcome: Outcome) -> float:
    return outcome.end_s - outcome.sent_s


def tpot_s(outcome: Outcome) -> float | None:
    """None for an answer of one token."""
    if outcome.output_tokens < 2:
        return None
    return (outcome.end_s - outcome.first_s) / (outcome.output_tokens - 1)


def is_good(outcome: Outcome, objectives_ms: dict[str, float]) -> bool:
    """Whether an answer that came is within all of them; one token has no TPOT to be late with."""
    have = {"ttft": ttft_s(outcome), "tpot": tpot_s(outcome) or 0.0, "e2el": e2el_s(outcome)}
    return all(have[name] * 1000 <= bound for name, bound in objectives_ms.items())


def summarise(outcomes: Sequence[Outcome], began_s: float, objectives_ms: dict[str, float]) -> Figures:
    """``began_s``: when the run began, on the clock of the outcomes."""
    good = [each for each in outcomes if not each.fault]
    faults = Counter(each.fault for each in outcomes if each.fault)
    values = {
        "ttft": [ttft_s(each) for each in good],
        "tpot": [tpot for each in good if (tpot := tpot_s(each)) is not None],
        "itl": [gap for each in good for gap in each.gaps_s],
        "e2el": [e2el_s(each) for each in good],
    }
    return Figures(
        completed=len(good),
        failures=dict(faults.most_common()),
        examples={each.fault: each.detail for each in reversed(outcomes) if each.fault},
        duration_s=max((each.end_s for each in outcomes), default=began_s) - began_s,
        total_input=sum(each.input_tokens for each in good),
        total_output=sum(each.output_tokens for each in good),
        num_good=sum(is_good(each, objectives_ms) for each in good) if objectives_ms else None,
        peak_output_tokens_per_s=_peak_tokens(good, began_s),
        peak_concurrent=_peak_concurrent(outcomes),
        held_s=math.fsum(each.held_s for each in outcomes) / len(outcomes) if outcomes else 0.0,
        spreads={name: Spread(sorted(value * 1000 for value in values[name])) for name, _, _ in METRICS},
    )


def tokens_by_second(outcomes: Sequence[Outcome], began_s: float) -> list[float]:
    """Output tokens in each second; an answer's tokens in equal parts on its chunks."""
    seconds: Counter[int] = Counter()
    for each in outcomes:
        share, at_s = each.output_tokens / (len(each.gaps_s) + 1), each.first_s
        for gap_s in (0.0, *each.gaps_s):
            at_s += gap_s
            seconds[max(0, int(at_s - began_s))] += share  # type: ignore[assignment]
    return [seconds[second] for second in range(max(seconds, default=-1) + 1)]


def _peak_tokens(outcomes: Sequence[Outcome], began_s: float) -> float:
    return max(tokens_by_second(outcomes, began_s), default=0.0)


def _peak_concurrent(outcomes: Sequence[Outcome]) -> int:
    changes = sorted(
        change for each in outcomes for change in ((each.sent_s, 1), (max(each.end_s, each.sent_s), -1))
    )
    running = peak = 0
    for _, change in changes:  # of one instant, ends come first
        running += change
        peak = max(peak, running)
    return peak


# --- the table ---------------------------------------------------------------------------------------


def _line(name: str, value: float) -> str:
    return f"{name:<40} {value:<10.2f}" if isinstance(value, float) else f"{name:<40} {value:<10}"


def table(figures: Figures, load: Load, percentiles: Sequence[float] = (99.0,)) -> list[str]:
    """Lines."""
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}"]
    lines.append(_line("Successful requests:", figures.completed))
    lines.append(_line("Failed requests:", figures.failed))
    if load.concurrency:
        lines.append(_line("Maximum request concurrency:", load.concurrency))
    if load.rate:
        lines.append(_line("Request rate configured (RPS):", float(load.rate)))
    lines.append(_line("Benchmark duration (s):", float(figures.duration_s)))
    lines.append(_line("Total input tokens:", figures.total_input))
    lines.append(_line("Total generated tokens:", figures.total_output))
    lines.append(_line("Request throughput (req/s):", figures.per_s(figures.completed)))
    if figures.num_good is not None:
        lines.append(_line("Request goodput (req/s):", figures.per_s(figures.num_good)))
    lines.append(_line("Output token throughput (tok/s):", figures.per_s(figures.total_output)))
    lines.append(_line("Peak output token throughput (tok/s):", float(figures.peak_output_tokens_per_s)))
    lines.append(_line("Peak concurrent requests:", float(figures.peak_concurrent)))
    total = figures.total_input + figures.total_output
    lines.append(_line("Total token throughput (tok/s):", figures.per_s(total)))
    for name, short, title in METRICS:
        spread = figures.spreads[name]
        lines.append(f"{title:-^{WIDTH}}")
        lines.append(_line(f"Mean {short} (ms):", spread.mean_ms))
        lines.append(_line(f"Median {short} (ms):", spread.percentile_ms(50)))
        for percent in percentiles:
            lines.append(_line(f"P{percent:g} {short} (ms):", spread.percentile_ms(percent)))
    lines.append("=" * WIDTH)
    return [line.rstrip() for line in lines]


def as_json(
    figures: Figures, load: Load, outcomes: Sequence[Outcome], complaints: Sequence[str]
) -> dict[str, Any]:
    """Names as in the result files of ``vllm bench serve``; ``valid`` and what it rests on are ours."""
    body: dict[str, Any] = {
        "valid": not complaints,
        "complaints": list(complaints),
        "model_id": load.model,
        "request_rate": load.rate or "inf",
        "burstiness": load.burstiness,
        "max_concurrency": load.concurrency or None,
        "duration": figures.duration_s,
        "completed": figures.completed,
        "failed": figures.failed,
        "failures": figures.failures,
        "total_input_tokens": figures.total_input,
        "total_output_tokens": figures.total_output,
        "request_throughput": figures.per_s(figures.completed),
        "request_goodput": None if figures.num_good is None else figures.per_s(figures.num_good),
        "output_throughput": figures.per_s(figures.total_output),
        "total_token_throughput": figures.per_s(figures.total_input + figures.total_output),
        "max_output_tokens_per_s": figures.peak_output_tokens_per_s,
        "max_concurrent_requests": figures.peak_concurrent,
    }
    for name, spread in figures.spreads.items():
        body[f"mean_{name}_ms"] = spread.mean_ms
        body[f"median_{name}_ms"] = spread.percentile_ms(50)
        body[f"std_{name}_ms"] = spread.std_ms
        body |= {f"p{percent:g}_{name}_ms": spread.percentile_ms(percent) for percent in KEPT}
    body["requests"] = [_row(each) for each in outcomes]
    return body


def _row(outcome: Outcome) -> dict[str, Any]:
    return {
        "number": outcome.number,
        "sent_s": outcome.sent_s,
        "slip_s": outcome.sent_s - outcome.due_s,
        "held_s": outcome.held_s,
        "ttft_s": None if outcome.fault else ttft_s(outcome),
        "e2el_s": e2el_s(outcome),
        "input_tokens": outcome.input_tokens,
        "output_tokens": outcome.output_tokens,
        "engines": outcome.engines,
        "strategy": outcome.strategy,
        "fault": outcome.fault,
        "detail": outcome.detail,
    }
