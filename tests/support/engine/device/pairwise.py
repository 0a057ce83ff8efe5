"""Few cases in which every two values of different axes meet, for cross products that only a GPU runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Always the same cases: each next one is, of the whole product, the one with most pairs not yet seen."""
    product = list(itertools.product(*(range(len(axis)) for axis in axes)))
    missing = {pair for case in product for pair in _pairs(case)}
    chosen = []
    while missing:
        best = max(product, key=lambda case: len(missing & _pairs(case)))
        missing -= _pairs(best)
        chosen.append(tuple(axis[place] for axis, place in zip(axes, best, strict=True)))
    return chosen


def _pairs(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return set(itertools.combinations(enumerate(case), 2))
