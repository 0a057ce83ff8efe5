"""Two versions compared by the times of their requests, at any time and as often as one likes: sans-I/O.

Source: Lindon, Ham, Tingley, Bojinov, "Anytime-Valid Linear Models and Regression Adjusted Causal Inference
in Randomized Experiments" (arXiv 2210.08589): the t statistic of a coefficient as an e-process by a normal
mixture over effects. Times are compared as logarithms, so a difference is a ratio, and a few slow requests do
not rule. What is known of a request whoever serves it (``scores.NUM_SUMS``) is taken out by regression with
one slope for both: prompts differ by far more than versions do. Beyond the paper, each side has a variance of
its own (Welch): a canary has few requests and may scatter more. That makes the promise asymptotic;
tests/services/index/trial/ holds it to it.

The promise: of comparisons of two equals, looked at after every request for ever, at most the share ``alpha``
ever says better or worse. Requests must be dealt by lot, which is so for a canary, and not for two strategies
that clients have chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from microserve.protocol.messages.strategy.scores import NUM_SUMS

BETTER, WORSE, NOT_YET = "better", "worse", "not yet"

MIN_SIDE = 15
"""Requests of each side before anything is said: of fewer, one odd one decides."""
PHI = 10.0
"""Effects are expected to be about 1 / sqrt(PHI) of the scatter, and to be found by some hundred requests:
there the interval is as narrow as it can be. Any value keeps the promise."""
MAX_GROWTH = 1e4
"""Times as many requests as there are: what would take more is not foreseen."""

MAX_SUM = 1e15
"""What a router says beyond it is junk: a year of a thousand requests a second is a hundredth of it."""

_DIM = 5
_UPPER = np.triu_indices(_DIM)
assert len(_UPPER[0]) == NUM_SUMS


@dataclass(frozen=True, slots=True)
class Result:
    """Of one measure: the one side's over the other's."""

    num: tuple[int, int]
    """Requests that counted, of the one and of the other."""
    ratio: float = 1.0
    low: float = 0.0
    high: float = math.inf
    """Where the ratio is, at any time of looking; infinite: nothing can be said yet."""
    growth: float = math.inf
    """Times as many requests of both would settle it, if the ratio is what it seems; 1 or less: it is
    settled."""

    @property
    def verdict(self) -> str:
        """Less is better."""
        return BETTER if self.high < 1.0 else WORSE if self.low > 1.0 else NOT_YET

    def is_not_worse(self, margin: float) -> bool:
        """By more than ``margin``, a ratio above 1."""
        return self.high < margin


def compare_times(ours: list[float], theirs: list[float], alpha: float) -> Result:
    """``ours`` over ``theirs``, sums as in ``Side``. ``alpha``: the share of wrong verdicts that is
    allowed."""
    num = (_count(ours), _count(theirs))
    if min(num) < MIN_SIDE:
        return Result(num)
    one, other = _Scatter(ours), _Scatter(theirs)
    # One slope for both, by least squares; what does not vary, or varies with another, has none of its own.
    within = one.xx + other.xx
    inverse = np.linalg.pinv(within, rcond=1e-9, hermitian=True)
    rank = int(np.linalg.matrix_rank(within, tol=1e-9 * max(float(np.trace(within)), 1e-300), hermitian=True))
    slope = inverse @ (one.xy + other.xy)
    apart = one.x - other.x
    effect = float(one.y - other.y - slope @ apart)
    left = [
        max(float(side.yy - 2 * slope @ side.xy + slope @ side.xx @ slope), 1e-12) for side in (one, other)
    ]
    freedom = sum(num) - 2 - rank
    pooled = sum(left) / freedom
    shares = [
        rest / (count - 1) * (sum(num) - 2) / freedom / count for rest, count in zip(left, num, strict=True)
    ]
    variance = sum(shares) + pooled * float(apart @ inverse @ apart)
    nu = max(sum(shares) ** 2 / sum(s * s / (n - 1) for s, n in zip(shares, num, strict=True)) - rank, 2.0)
    radius = _radius(variance, pooled, nu, alpha)
    growth = 0.0 if radius < abs(effect) else _growth(abs(effect), variance, pooled, nu, alpha)
    return Result(num, math.exp(effect), _exp(effect - radius), _exp(effect + radius), growth)


class _Scatter:
    """Means and centred products of one side."""

    def __init__(self, sums: list[float]) -> None:
        full: npt.NDArray[np.float64] = np.zeros((_DIM, _DIM))
        full[_UPPER] = sums
        full += np.triu(full, 1).T
        count = full[0, 0]
        means = full[0, 1:] / count
        centred = full[1:, 1:] - count * np.outer(means, means)
        self.x, self.y = means[:-1], float(means[-1])
        self.xx, self.xy, self.yy = centred[:-1, :-1], centred[:-1, -1], float(centred[-1, -1])


def _count(sums: list[float]) -> int:
    """Requests that counted; 0 also where these are no sums of anything."""
    is_sane = len(sums) == NUM_SUMS and all(abs(each) < MAX_SUM for each in sums)
    return max(0, round(sums[0])) if is_sane else 0


def _radius(variance: float, scatter: float, nu: float, alpha: float) -> float:
    """Half of the interval of the effect. ``variance``: the effect's; ``scatter``: one request's."""
    r = PHI / (PHI + scatter / variance)
    x = math.exp((math.log(r) + 2 * math.log(alpha)) / (nu + 1))
    return math.inf if x <= r else math.sqrt(variance * nu * (1 - x) / (x - r))


def _growth(effect: float, variance: float, scatter: float, nu: float, alpha: float) -> float:
    """How many times as many requests, with all else as it is, would make the radius as small as the
    effect."""

    def settles(growth: float) -> bool:
        return _radius(variance / growth, scatter, nu * growth, alpha) < effect

    if not settles(MAX_GROWTH):
        return math.inf
    low, high = 1.0, MAX_GROWTH
    while high > low * 1.01:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if settles(middle) else (middle, high)
    return high


def _exp(value: float) -> float:
    return math.exp(value) if value < 700.0 else math.inf
