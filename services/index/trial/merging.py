"""What several routers say of one thing, added, and what can be read from it: sans-I/O."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from functools import reduce
from itertools import zip_longest

from microserve.protocol.messages.strategy.control import ControlEntry
from microserve.protocol.messages.strategy.scores import Score, Side, Times, Trial, bucket_start_s


def added_sides(sides: Iterable[Side]) -> Side:
    return reduce(_both, sides, Side())


def _both(one: Side, other: Side) -> Side:
    return Side(
        one.num_requests + other.num_requests,
        one.num_failed + other.num_failed,
        *(_sums(ours, theirs) for ours, theirs in zip(_lists(one), _lists(other), strict=True)),
    )


def _lists(side: Side) -> tuple[list[float], ...]:
    return side.ttft, side.tpot, side.jct


def _sums(one: list[float], other: list[float]) -> list[float]:
    return [a + b for a, b in zip_longest(one, other, fillvalue=0.0)]


def trial_of(entry: ControlEntry, said: Iterable[Trial]) -> Trial | None:
    """The trial of a strategy's canary as all routers together have it; None: nobody has said anything.

    What a router says of another canary, version or share is left out: it has not applied the state yet."""
    if entry.canary is None:
        return None
    stable = 0 if entry.stable is None else entry.stable.version
    wanted = (entry.strategy, stable, entry.canary.version, entry.share)
    found = [
        trial
        for trial in said
        if (trial.strategy, trial.stable_version, trial.canary_version, trial.share) == wanted
    ]
    if not found:
        return None
    return Trial(
        *wanted,
        any(trial.is_sticky for trial in found),
        max(trial.seconds for trial in found),
        added_sides(trial.stable for trial in found),
        added_sides(trial.canary for trial in found),
    )


def added_times(times: Iterable[Times]) -> Times:
    counts: Counter[int] = Counter()
    num, log_sum, log_square_sum = 0, 0.0, 0.0
    for each in times:
        counts.update(each.buckets)
        num += each.num
        log_sum += each.log_sum
        log_square_sum += each.log_square_sum
    return Times(num, log_sum, log_square_sum, dict(sorted(counts.items())))


def added_scores(scores: Iterable[Score]) -> list[Score]:
    """One for each version, share and engine: all engines first, then one by one."""
    by_key: dict[tuple[str, int, str, str], list[Score]] = {}
    for score in scores:
        key = (score.strategy, score.version, score.share, score.engine_id)
        by_key.setdefault(key, []).append(score)
    return [_added(key, each) for key, each in sorted(by_key.items())]


def _added(key: tuple[str, int, str, str], scores: list[Score]) -> Score:
    failures: Counter[str] = Counter()
    for score in scores:
        failures.update(score.failures)
    sides = [score.side for score in scores if score.side is not None]
    return Score(
        *key,
        sum(score.num_requests for score in scores),
        dict(failures.most_common()),
        sum(score.num_mistakes for score in scores),
        sum(score.num_moves for score in scores),
        sum(score.prompt_tokens for score in scores),
        sum(score.cached_tokens for score in scores),
        sum(score.received_tokens for score in scores),
        sum(score.output_tokens for score in scores),
        added_times(score.ttft for score in scores),
        added_times(score.tpot for score in scores),
        added_times(score.jct for score in scores),
        max(score.seconds for score in scores),
        added_sides(sides) if sides else None,
    )


def quantile_s(times: Times, share: float) -> float:
    """The time within which this share of them is, to a bucket's half; 0 without any."""
    left = share * times.num
    for bucket, count in sorted(times.buckets.items()):
        left -= count
        if left <= 0:
            return bucket_start_s(bucket + 0.5)
    return 0.0


def mean_s(times: Times) -> tuple[float, float, float]:
    """The geometric mean, and where it is in 95 of 100 cases; zeros without any."""
    if not times.num:
        return 0.0, 0.0, 0.0
    mean = times.log_sum / times.num
    if times.num < 2:
        return math.exp(mean), 0.0, math.inf
    variance = max(0.0, times.log_square_sum - times.num * mean * mean) / (times.num - 1)
    half = 1.96 * math.sqrt(variance / times.num)
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)
