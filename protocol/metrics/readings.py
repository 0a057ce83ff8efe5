"""What a service has measured, as of one moment: made in its own thread, read in any other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from microserve.protocol.metrics.family import Family
from microserve.protocol.metrics.histogram import Histogram

Value = float | Histogram


class Readings:
    def __init__(self, common: Mapping[str, str] | None = None) -> None:
        """``common``: labels of every family in it."""
        self.common = dict(common or {})
        self._values: dict[Family, list[tuple[tuple[str, ...], Value]]] = {}

    def add(self, family: Family, value: Value, *labels: str) -> None:
        """One series of a family; ``labels``: values of ``family.labels``. A histogram is copied."""
        if len(labels) != len(family.labels):
            raise ValueError(f"{family.name} has labels {family.labels}, given {labels}")
        kept = value.copy() if isinstance(value, Histogram) else value
        self._values.setdefault(family, []).append((labels, kept))

    def add_each(self, family: Family, values: Mapping[str, Value]) -> None:
        """A series for each value of the family's only label."""
        for label, value in values.items():
            self.add(family, value, label)

    def __iter__(self) -> Iterator[tuple[Family, list[tuple[tuple[str, ...], Value]]]]:
        return iter(self._values.items())
