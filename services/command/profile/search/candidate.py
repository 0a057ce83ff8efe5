"""A candidate as a search sees it: a place among others, and its ratio, which is known beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Candidate:
    index: int
    """In the row of all candidates."""
    features: tuple[float, ...]
    ratio: float
    """Raw bytes / bytes on the wire: cheap, so that it is measured of every candidate beforehand."""


@dataclass(frozen=True, slots=True)
class Point:
    """A candidate that was measured."""

    candidate: Candidate
    score: float


class Search(Protocol):
    points: list[Point]
    """What it was told, in order."""

    def ask(self) -> Candidate | None:
        """What is to be measured next; None: nothing more. Asked again before it is told, it says the
        same."""

    def tell(self, candidate: Candidate, score: float) -> None: ...


def embed(rows: Sequence[Mapping[str, str | float]]) -> list[tuple[float, ...]]:
    """One-hot for words, 0 to 1 between the least and the largest for numbers. What is the same everywhere
    is left out."""
    columns: list[npt.NDArray[np.float64]] = []
    for name in rows[0]:
        values = [row[name] for row in rows]
        known = sorted(set(values), key=str)
        if len(known) == 1:
            continue
        if isinstance(values[0], str):
            columns += [np.array([float(value == each) for value in values]) for each in known]
        else:
            numbers = np.array(values, dtype=np.float64)
            columns.append((numbers - numbers.min()) / np.ptp(numbers))
    table = np.stack(columns, axis=1) if columns else np.zeros((len(rows), 1))
    return [tuple(row) for row in table.tolist()]


def candidates(rows: Sequence[Mapping[str, str | float]], ratios: Sequence[float]) -> list[Candidate]:
    """rows: what each is, by names of parameters."""
    places = embed(rows)
    return [
        Candidate(index, place, ratio)
        for index, (place, ratio) in enumerate(zip(places, ratios, strict=True))
    ]
