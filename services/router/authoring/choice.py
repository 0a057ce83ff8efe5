"""How scores become a choice: stretched, weighed and added up, or drawn by temperature.

Numbers in, numbers out: knows neither engines nor requests.

Source: llm-d's scorer pipeline (weighted sum); Dynamo's min-max softmax, where temperature has no unit.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from microserve.protocol.errors import StrategyError

READS_ONLY = ("",)
"""Where a strategy that hangs may be broken off (../oversight/cut.py)."""


class Scores(NamedTuple):
    """What one scorer says of every candidate."""

    name: str
    scores: Sequence[float]
    weight: float


def combined(reasons: Iterable[Scores], num_candidates: int) -> list[float]:
    """Weighted sum of every candidate's normalised scores. Raises :class:`StrategyError` for NaN and -inf."""
    totals = [0.0] * num_candidates
    for name, scores, weight in reasons:
        if not all(score > -math.inf for score in scores) or not math.isfinite(weight):
            raise StrategyError(f"scorer {name} gave {scores} with weight {weight}")
        for position, share in enumerate(normalised(scores)):
            totals[position] += weight * share
    return totals


def normalised(scores: Sequence[float]) -> list[float]:
    """Stretched over [0, 1]; equal ones are 0. ``inf`` is as good as the best finite one."""
    finite = [score for score in scores if score < math.inf]
    if not finite:
        return [0.0] * len(scores)
    low, high = min(finite), max(finite)
    span = high / 2 - low / 2  # halves: the difference of two large numbers may be infinite
    if span <= 0.0:
        return [0.0] * len(scores)
    return [(min(score, high) / 2 - low / 2) / span for score in scores]


def softmax_choice(scores: Sequence[float], temperature: float, rng: random.Random) -> int:
    """A position drawn with probability ``exp(normalised score / temperature)``; equal scores: uniformly.

    ``temperature`` > 0, without a unit: at 1 the best is e times as likely as the worst. Raises
    :class:`StrategyError` for a score that is no finite number.
    """
    if not all(map(math.isfinite, scores)):
        raise StrategyError(f"costs {list(scores)} cannot be drawn by temperature: one is not finite")
    shares = normalised(scores)
    top = max(shares)
    weights = [math.exp((share - top) / temperature) for share in shares]
    return rng.choices(range(len(scores)), weights)[0]
