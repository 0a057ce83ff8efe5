"""Two versions compared by how many of their requests fail, at any time and as often as one likes: sans-I/O.

Source: Lindon, Malek, "Anytime-Valid Inference for Multinomial Count Data" (NeurIPS 2022): if two versions
fail as often, each failure is one of the canary's as often as a request is; the counts of failures are then
those of a coin whose odds are known, and a Beta mixture over other odds is an e-process. It needs no number
of requests for which it is exact, and no constant rate: an engine that dies costs both alike.
"""

from __future__ import annotations

import math
from math import lgamma

from microserve.services.index.trial.comparison import MAX_GROWTH, Result

CONCENTRATION = 4.0
"""Of the mixture over odds. Any value keeps the promise."""


def compare_failures(ours: tuple[int, int], theirs: tuple[int, int], share: float, alpha: float) -> Result:
    """``ours`` over ``theirs``, each failed requests and all. ``share``: of the requests, those that are
    dealt to us. ``alpha``: the share of wrong verdicts that is allowed."""
    num = (ours[1], theirs[1])
    if not ours[0] + theirs[0] or not 0.0 < share < 1.0:
        return Result(num)
    low, high = _interval(ours[0], theirs[0], share, alpha)
    found = (ours[0] / max(ours[0] + theirs[0], 1)) or 0.0
    ratio = _ratio(found, share)
    settled = low > share or high < share
    growth = 0.0 if settled else _growth(ours[0], theirs[0], share, alpha)
    return Result(num, ratio, _ratio(low, share), _ratio(high, share), growth)


def _ratio(odds_share: float, share: float) -> float:
    """Of the rates of failure, if this share of the failures is ours."""
    if odds_share >= 1.0:
        return math.inf
    return odds_share / (1 - odds_share) * (1 - share) / share


def _log_e(ours: float, theirs: float, share: float, at: float) -> float:
    """Evidence against ``at`` being the share of failures that are ours."""
    a, b = CONCENTRATION * share, CONCENTRATION * (1 - share)
    mixture = _log_beta(a + ours, b + theirs) - _log_beta(a, b)
    return mixture - _power(at, ours) - _power(1 - at, theirs)


def _power(base: float, exponent: float) -> float:
    """Logarithm of base to the power of exponent."""
    return 0.0 if exponent == 0 else exponent * math.log(base) if base > 0.0 else -math.inf


def _log_beta(a: float, b: float) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)


def _interval(ours: float, theirs: float, share: float, alpha: float) -> tuple[float, float]:
    """Of the share of failures that are ours."""
    found, bound = ours / (ours + theirs), -math.log(alpha)

    def border(inside: float, outside: float) -> float:
        if _log_e(ours, theirs, share, outside) < bound:
            return outside
        for _ in range(60):
            middle = (inside + outside) / 2
            if _log_e(ours, theirs, share, middle) < bound:
                inside = middle
            else:
                outside = middle
        return outside

    return border(found, 0.0), border(found, 1.0)


def _growth(ours: int, theirs: int, share: float, alpha: float) -> float:
    """How many times as many failures, dealt as these, would settle it."""

    def settles(growth: float) -> bool:
        return _log_e(ours * growth, theirs * growth, share, share) >= -math.log(alpha)

    if not settles(MAX_GROWTH):
        return math.inf
    low, high = 1.0, MAX_GROWTH
    while high > low * 1.01:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if settles(middle) else (middle, high)
    return high
