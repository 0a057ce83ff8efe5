"""How long prompts are: a weighted sample, whatever it was made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import ArrayLike, NDArray

from microserve.protocol.errors import ConfigError

Tokens = Annotated[float, Meta(gt=0.0, le=1 << 24)]
NUM_POINTS = 20_000
"""Of a distribution that is given as a formula: its quantiles at as many places."""
WITHIN = 16
"""Of one bucket of a histogram, evenly over it."""


class LogNormal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Cut off below ``low`` and above ``high``."""

    mu: float
    sigma: Annotated[float, Meta(gt=0.0, le=10.0)]
    low: Tokens
    high: Tokens


class LengthSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of the two."""

    log_normal: LogNormal | None = None
    histogram: list[tuple[Tokens, Annotated[float, Meta(ge=0.0)]]] = []
    """Upper end of a bucket, and how many are in it; the first begins at 0."""


@dataclass(frozen=True)
class Parts:
    """Both sides of each of some thresholds (arrays of as many)."""

    share_long: NDArray[np.float64]
    """Of prompts longer than the threshold."""
    mean_long: NDArray[np.float64]
    """Tokens of those; 0 where there are none."""
    mean_short: NDArray[np.float64]


class Lengths:
    """A weighted sample of lengths, in tokens."""

    def __init__(self, values: ArrayLike, weights: ArrayLike | None = None) -> None:
        """Raises :class:`ConfigError` for a sample without weight."""
        given = np.asarray(values, dtype=np.float64)
        weight = np.ones_like(given) if weights is None else np.asarray(weights, dtype=np.float64)
        order = np.argsort(given, kind="stable")
        self.values, self.weights = given[order], weight[order]
        total = float(self.weights.sum())
        if not given.size or not total > 0.0:
            raise ConfigError("lengths: there are none", field="lengths")
        self.weights = self.weights / total
        self._below = np.concatenate([[0.0], np.cumsum(self.weights)])
        self._tokens_below = np.concatenate([[0.0], np.cumsum(self.weights * self.values)])

    @classmethod
    def of(cls, spec: LengthSpec) -> Lengths:
        """Raises :class:`ConfigError`."""
        if (spec.log_normal is None) == (not spec.histogram):
            raise ConfigError("lengths: either log_normal or histogram must be given", field="lengths")
        if spec.log_normal is not None:
            return cls(_quantiles(spec.log_normal, (np.arange(NUM_POINTS) + 0.5) / NUM_POINTS))
        return cls.from_histogram(spec.histogram)

    @classmethod
    def from_histogram(cls, buckets: Sequence[tuple[float, float]]) -> Lengths:
        """``buckets``: upper end and count of each, in order. Raises :class:`ConfigError`."""
        uppers = [upper for upper, _ in buckets]
        lowers = [0.0, *uppers[:-1]]
        if any(upper <= lower for lower, upper in zip(lowers, uppers, strict=True)):
            raise ConfigError("lengths.histogram: ends must rise", field="lengths.histogram")
        places = (np.arange(WITHIN) + 0.5) / WITHIN
        values = [low + (high - low) * places for low, high in zip(lowers, uppers, strict=True)]
        weights = [np.full(WITHIN, count / WITHIN) for _, count in buckets]
        return cls(np.concatenate(values or [np.zeros(0)]), np.concatenate(weights or [np.zeros(0)]))

    @property
    def longest(self) -> float:
        return float(self.values[-1])

    @property
    def mean(self) -> float:
        return float(self._tokens_below[-1])

    def part(self, thresholds: ArrayLike) -> Parts:
        """What is longer than each threshold, and what is not."""
        place = np.searchsorted(self.values, np.asarray(thresholds, dtype=np.float64), side="right")
        short, tokens_short = self._below[place], self._tokens_below[place]
        long = np.where(place == len(self.values), 0.0, 1.0 - short)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean_long = np.where(long > 0.0, (self._tokens_below[-1] - tokens_short) / long, 0.0)
            mean_short = np.where(short > 0.0, tokens_short / short, 0.0)
        return Parts(long, mean_long, mean_short)

    def quantile(self, of: NDArray[np.float64], share: float) -> float:
        """Of a quantity that each length has, [as many as values]."""
        order = np.argsort(of, kind="stable")
        place = np.searchsorted(np.cumsum(self.weights[order]), share)
        return float(of[order][min(int(place), len(of) - 1)])

    def drawn(self, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """By lot."""
        return rng.choice(self.values, count, p=self.weights)


def _quantiles(spec: LogNormal, shares: NDArray[np.float64]) -> list[float]:
    if spec.high <= spec.low:
        raise ConfigError("lengths.log_normal: high must be above low", field="lengths.log_normal.high")
    normal = NormalDist(spec.mu, spec.sigma)
    below, upto = normal.cdf(math.log(spec.low)), normal.cdf(math.log(spec.high))
    if upto <= below:
        raise ConfigError("lengths.log_normal: nothing lies between low and high", field="lengths.log_normal")
    tiny = 1e-15
    return [math.exp(normal.inv_cdf(min(max(below + (upto - below) * s, tiny), 1 - tiny))) for s in shares]
