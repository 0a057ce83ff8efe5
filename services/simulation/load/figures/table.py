"""Results as lines for people: a row for each strategy and load, and below it what it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from microserve.services.simulation.load.figures.result import PointResult, middle

HEADER = (
    f"{'strategy':<20}{'req/s':>6}  {'TTFT s: mean':>12}{'p50':>8}{'p99':>8}  {'TPOT ms: mean':>13}{'p50':>7}"
    f"{'p99':>7}  {'JCT s: mean':>11}{'p50':>8}{'p99':>8}{'good/s':>8}{'served':>8}{'refused':>8}"
    f"{'failed':>7}{'hits':>7}{'sent GB':>9}"
)


def line_of(result: PointResult) -> str:
    """One row below :data:`HEADER`."""
    ttft, tpot, jct = result.ttft_s, result.tpot_s, result.jct_s
    return (
        f"{result.strategy:<20}{result.load:>6g}  {ttft.mean:>12.2f}{ttft.p50:>8.2f}{ttft.p99:>8.2f}  "
        f"{tpot.mean * 1e3:>13.1f}{tpot.p50 * 1e3:>7.1f}{tpot.p99 * 1e3:>7.1f}  "
        f"{jct.mean:>11.2f}{jct.p50:>8.2f}{jct.p99:>8.2f}{result.goodput_per_s:>8.2f}{result.num_served:>8}"
        f"{result.num_refused:>8}{result.num_failed:>7}{result.hit_rate:>7.3f}{result.sent_gb:>9.0f}"
    )


def lines_of(results: Sequence[PointResult], *, detail: bool) -> Iterator[str]:
    """One point under one or more seeds: the medians, what lies around them, and with ``detail`` more."""
    both = middle(results)
    yield line_of(both)
    if len(results) > 1:
        yield f"    {len(results)} seeds, least to most: {_around(results)}"
    if detail:
        yield from _by_length(both)
        yield from _engines(both)


def _around(results: Sequence[PointResult]) -> str:
    figures = (
        ("TTFT mean", [each.ttft_s.mean for each in results], "{:.2f}", " s"),
        ("p99", [each.ttft_s.p99 for each in results], "{:.2f}", " s"),
        ("TPOT mean", [each.tpot_s.mean * 1e3 for each in results], "{:.1f}", " ms"),
        ("JCT mean", [each.jct_s.mean for each in results], "{:.2f}", " s"),
        ("good/s", [each.goodput_per_s for each in results], "{:.2f}", ""),
        ("failed", [each.num_failed for each in results], "{:d}", ""),
    )
    return ", ".join(
        f"{name} {form.format(min(values))} to {form.format(max(values))}{unit}"
        for name, values, form, unit in figures
    )


def _by_length(result: PointResult) -> Iterator[str]:
    yield f"    {'prompt tokens':<20}{'requests':>9}{'served':>8}  {'TTFT s: mean':>12}{'p50':>8}{'p99':>8}"
    for bucket in result.by_length:
        bounds, ttft = f"{bucket.from_tokens:,} to {bucket.below_tokens:,}", bucket.ttft_s
        yield (
            f"    {bounds:<20}{bucket.num_requests:>9}{bucket.num_served:>8}  "
            f"{ttft.mean:>12.2f}{ttft.p50:>8.2f}{ttft.p99:>8.2f}"
        )


def _engines(result: PointResult) -> Iterator[str]:
    yield (
        f"    {'engine':<20}{'requests':>9}{'busy':>8}  {'tokens: prompt':>14}{'output':>12}"
        f"{'KV: mean':>10}{'peak':>7}"
    )
    for each in result.engines:
        yield (
            f"    {each.engine_id:<20}{each.num_requests:>9}{each.busy_share:>8.0%}  "
            f"{each.prompt_tokens:>14,}{each.output_tokens:>12,}{each.kv_share:>10.0%}{each.kv_peak_share:>7.0%}"
        )
