"""What the Bayesian search is held against: every candidate, and some by lot."""

from __future__ import annotations

import random
from collections.abc import Sequence

from microserve.services.command.profile.search.candidate import Candidate, Point


class InOrder:
    """Those of a given order, until ``most`` are measured; 0: all."""

    def __init__(self, candidates: Sequence[Candidate], most: int = 0) -> None:
        self._order = list(candidates)[: most or None]
        self.points: list[Point] = []

    def ask(self) -> Candidate | None:
        return self._order[len(self.points)] if len(self.points) < len(self._order) else None

    def tell(self, candidate: Candidate, score: float) -> None:
        self.points.append(Point(candidate, score))


def by_lot(candidates: Sequence[Candidate], most: int, seed: int) -> InOrder:
    """``most`` of them, each at most once."""
    return InOrder(random.Random(f"lot {seed}").sample(list(candidates), len(candidates)), most)
