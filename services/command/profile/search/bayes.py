"""KVServe's profiling engine: where to measure next, by what a surrogate makes of what was measured.

    next    the largest   ratio * P(score >= floor) + weight * deviation / largest deviation * mean ratio
    weight  falls from turn to turn, so that it looks around first

The paper has one floor, and finds what goes farthest at that quality. A library is for many: here the floor
is drawn anew each turn, between the least that is asked for and the best that was seen, so that the whole
front is found, and what is left out is not what is below some ratio but what can hardly be on the front any
more: what is expected, with some confidence, to be no better than a point with a larger ratio. Then the front
itself is doubted: what might be better than a point of it is measured too, likeliest first.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from microserve.services.command.profile.search.candidate import Candidate, Point
from microserve.services.command.profile.search.front import front_of, hypervolume
from microserve.services.command.profile.search.surrogate import Guess, guess

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Options:
    floor: float
    """Of scores that are of any use."""
    most: int
    """Measurements."""
    num_first: int = 8
    """Measured before there is a surrogate, evenly over the ratios from the largest on."""
    weight: float = 1.0
    decay: float = 0.97
    least_weight: float = 0.05
    patience: int = 16
    """It ends after so many measurements in a row that have added nothing to speak of to the front."""
    gain: float = 1e-4
    """Of the area under the front: less is nothing to speak of."""
    share: float = 0.6
    """Of ``most``, for finding the front; the rest is for doubting it."""
    doubt: float = 0.05
    """Chance from which on what might be better than a point of the front is measured."""
    too_much: float = 0.25
    """Chance from which on a point of the front is not returned, for want of that measurement."""


class Bayes:
    def __init__(self, candidates: Sequence[Candidate], options: Options, seed: int) -> None:
        self._options, self._seed = options, seed
        self._chance = random.Random(f"bayes {seed}")
        self._left = {candidate.index: candidate for candidate in candidates}
        self._first = self._strata(candidates)
        self._next: Candidate | None = None
        self._area, self._num_idle = 0.0, 0
        self.points: list[Point] = []

    def _strata(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """One by lot of each of as many neighbourhoods of ratios."""
        ordered = sorted(candidates, key=lambda each: -each.ratio)
        parts = np.array_split(np.arange(len(ordered)), min(self._options.num_first, len(ordered)))
        return [ordered[self._chance.choice(part.tolist())] for part in parts if len(part)]

    def ask(self) -> Candidate | None:
        if self._next is None and len(self.points) < self._options.most and self._left:
            self._next = self._first[0] if self._first else self._likeliest()
        return self._next

    def tell(self, candidate: Candidate, score: float) -> None:
        self.points.append(Point(candidate, score))
        self._left.pop(candidate.index)
        self._first = [each for each in self._first if each.index != candidate.index]
        self._next = None
        area = hypervolume(self.points, self._options.floor)
        is_idle = area <= self._area * (1 + self._options.gain)
        self._num_idle = self._num_idle + 1 if is_idle and not self._first else 0
        self._area = area

    def _likeliest(self) -> Candidate | None:
        options, left = self._options, list(self._left.values())
        guessed = guess(self.points, left, self._seed + len(self.points))
        ratios = np.array([each.ratio for each in left])
        if len(self.points) >= options.share * options.most or self._num_idle >= options.patience:
            chance = self._chance_to_dominate(guessed, ratios)
            if chance.max() >= options.doubt:
                return left[int(chance.argmax())]
        worth = self._worth(guessed, ratios)
        worth[self._is_hopeless(guessed, ratios)] = -np.inf
        is_over = self._num_idle >= options.patience or not np.isfinite(worth.max())
        return None if is_over else left[int(worth.argmax())]

    def _worth(self, guessed: Guess, ratios: Floats) -> Floats:
        options = self._options
        best = max(point.score for point in self.points)
        floor = self._chance.uniform(options.floor, max(best, options.floor))
        turn = len(self.points)
        weight = max(options.least_weight, options.weight * options.decay**turn)
        spread = guessed.deviation / max(float(guessed.deviation.max()), 1e-12)
        worth: Floats = ratios * guessed.chance(floor) + weight * spread * ratios.mean()
        return worth

    def _is_hopeless(self, guessed: Guess, ratios: Floats) -> npt.NDArray[np.bool_]:
        """Two deviations above what is expected of it, it would still be dominated, or of no use."""
        hoped = guessed.mean + 2 * guessed.deviation
        return hoped <= self._reached(ratios)

    def _reached(self, ratios: Floats) -> Floats:
        """Of each ratio the best score that was measured at that one or a larger one; at least the floor."""
        front = front_of(self.points, self._options.floor)
        return np.array(
            [
                max([self._options.floor, *(p.score for p in front if p.candidate.ratio >= ratio)])
                for ratio in ratios
            ]
        )

    def front(self) -> list[Point]:
        """What is returned: points that no measured one is better than, nor, as far as can be told, any
        other. From the largest ratio on."""
        front, left = front_of(self.points, self._options.floor), list(self._left.values())
        if not front or not left:
            return front
        chance = self._chances(
            guess(self.points, left, self._seed), np.array([each.ratio for each in left]), front
        )
        return [
            point
            for point, each in zip(front, chance.max(axis=1), strict=True)
            if each < self._options.too_much
        ]

    def _chance_to_dominate(self, guessed: Guess, ratios: Floats) -> Floats:
        """Of each candidate that is left, that it is better than some point of the front."""
        front = front_of(self.points, self._options.floor)
        return self._chances(guessed, ratios, front).max(axis=0) if front else np.zeros(len(ratios))

    def _chances(self, guessed: Guess, ratios: Floats, front: Sequence[Point]) -> Floats:
        """[points of the front, candidates]: that the one is no better than the other, which has as large a
        ratio."""
        return np.array([guessed.chance(p.score) * (ratios >= p.candidate.ratio) for p in front])
