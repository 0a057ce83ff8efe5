"""A guess of scores that were not measured, with how sure it is: a Gaussian process on those that were.

The kernel is KVServe's: Matérn 1.5 on embedded parameters, and white noise for what a few prompts cannot
tell.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from microserve.services.command.profile.search.candidate import Candidate, Point

RESTARTS = 5
NOISE = 1e-4
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Guess:
    mean: Floats
    deviation: Floats
    """Of a score that is measured: with the noise of that."""

    def chance(self, floor: float) -> Floats:
        """That the score is at least ``floor``."""
        away = (floor - self.mean) / np.maximum(self.deviation, 1e-9)
        return np.array([math.erfc(each / math.sqrt(2)) / 2 for each in away])


def guess(points: Sequence[Point], wanted: Sequence[Candidate], seed: int) -> Guess:
    """points: at least two. Of each of ``wanted``, in order."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern, WhiteKernel
    from threadpoolctl import threadpool_limits

    known = np.array([point.candidate.features for point in points])
    kernel = Matern(length_scale=1.0, nu=1.5) + WhiteKernel(NOISE)
    process = GaussianProcessRegressor(
        kernel, normalize_y=True, n_restarts_optimizer=RESTARTS, random_state=seed
    )
    # Of so few points one thread makes more than several that wait for each other.
    with warnings.catch_warnings(), threadpool_limits(1):
        # It says so wherever a parameter ends at a bound, as that of the noise does where there is none.
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit(known, np.array([point.score for point in points]))
        mean, deviation = process.predict(
            np.array([candidate.features for candidate in wanted]), return_std=True
        )
    return Guess(np.asarray(mean), np.asarray(deviation))
