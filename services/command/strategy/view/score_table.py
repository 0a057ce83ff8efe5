"""How versions fare, and which is better, in lines. Knows neither flags nor sockets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from microserve.services.index.trial.merging import added_scores, mean_s, quantile_s

if TYPE_CHECKING:
    from microserve.protocol.messages.strategy.scores import Score, Times
    from microserve.services.index.trial.comparison import Result


def board_lines(scores: Iterable[Score]) -> list[str]:
    """Of all routers together: each version and share, then its engines."""
    lines = []
    for score in added_scores(scores):
        if score.engine_id:
            lines.append(f"    {_counts(score, score.engine_id)}")
            times = [f"{name} {_time(mean_s(each)[0])}" for name, each in _measures(score) if each.num]
            lines[-1] += f"  {'  '.join(times)}" if times else ""
            continue
        lines.append(f"{score.share or '-':<7} {score.version or '(own)':>5}  {_counts(score)}")
        lines += [f"  {name}  {_spread(times)}" for name, times in _measures(score) if times.num]
    return lines or ["no request has ended yet"]


def _measures(score: Score) -> tuple[tuple[str, Times], ...]:
    return ("TTFT", score.ttft), ("TPOT", score.tpot), ("JCT ", score.jct)


def _counts(score: Score, who: str = "") -> str:
    failed = sum(score.failures.values())
    codes = ", ".join(f"{count} {code}" for code, count in score.failures.items())
    parts = [
        f"{score.num_requests} requests",
        f"{failed} failed ({codes})" if failed else "none failed",
        f"{score.num_mistakes} mistakes" if score.num_mistakes else "",
        f"{score.num_moves} moves" if score.num_moves else "",
        f"cached {score.cached_tokens / score.prompt_tokens:.0%}" if score.prompt_tokens else "",
        f"received {score.received_tokens / score.prompt_tokens:.0%}" if score.received_tokens else "",
    ]
    return "  ".join(filter(None, (who, ", ".join(filter(None, parts)))))


def _spread(times: Times) -> str:
    mean, low, high = mean_s(times)
    between = f"  (95 %: {_time(low)} to {_time(high)})" if times.num > 1 else ""
    half, most = quantile_s(times, 0.5), quantile_s(times, 0.9)
    return f"mean {_time(mean)}{between}  p50 {_time(half)}  p90 {_time(most)}"


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def comparison_lines(results: Mapping[str, Result], seconds: float) -> list[str]:
    """A line a measure. ``seconds``: in which the requests that counted came."""
    return [
        f"  {name:<9} {result.verdict:<8} {_told(name, result, seconds)}" for name, result in results.items()
    ]


def _told(name: str, result: Result, seconds: float) -> str:
    num = result.num[0] + result.num[1]
    if result.high == math.inf and result.low == 0.0 and result.growth == math.inf:
        return "none failed" if name == "failures" and num else f"too few requests: {_num(result)}"
    told = f"{result.ratio:.2f} times  ({result.low:.2f} to {_high(result.high)})"
    if result.growth <= 1.0:
        return told
    more, more_s = more_of(result, seconds)
    if more is None or more_s is None:
        return f"{told}  no difference in sight"
    return f"{told}  some {more} requests more, {_duration(more_s)} at this rate, if it is what it seems"


def _num(result: Result) -> str:
    return f"{result.num[0]} and {result.num[1]}"


def _high(value: float) -> str:
    return "any" if value == math.inf else f"{value:.2f}"


def more_of(result: Result, seconds: float) -> tuple[int | None, float | None]:
    """Requests of both, and seconds at the rate up to now, until the verdict; None: it is not foreseen."""
    if result.growth <= 1.0:
        return 0, 0.0
    if result.growth == math.inf:
        return None, None
    num = result.num[0] + result.num[1]
    return math.ceil(num * (result.growth - 1)), seconds * (result.growth - 1)


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
