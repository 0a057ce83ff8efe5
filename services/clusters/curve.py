"""A quantity by length in tokens: given at points, or as a polynomial of the second degree."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import ArrayLike, NDArray

from microserve.protocol.errors import ConfigError

Amount = Annotated[float, Meta(ge=0.0)]
Point = tuple[Amount, Amount]


class Curve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Never below 0, and never falling with length: what is fitted to points may do both at its ends."""

    points: list[Point] = []
    """Tokens and the quantity there."""
    quadratic: tuple[float, float, float] | None = None
    """``a + b l + c l²``, where no points are known."""
    fit: Literal["quadratic", "linear"] = "quadratic"
    """What goes through the points: one parabola by least squares, as prefill seconds are; or straight lines
    from one to the next, beyond the outermost as between the last two, as bytes of KV are."""

    def check(self, field: str) -> None:
        """Raises :class:`ConfigError` that names ``field``."""
        if (self.quadratic is None) == (not self.points):
            raise ConfigError(f"{field}: either points or quadratic must be given", field=field)
        lengths = [length for length, _ in self.points]
        if any(later <= earlier for earlier, later in pairwise(lengths)):
            raise ConfigError(f"{field}.points: lengths must rise", field=f"{field}.points")
        if len(self.points) == 1:
            raise ConfigError(f"{field}.points: one point is no curve", field=f"{field}.points")
        if self.quadratic is not None and (min(self.quadratic) < 0.0 or sum(self.quadratic) <= 0.0):
            field = f"{field}.quadratic"
            raise ConfigError(f"{field}: must be 0 or more, and not all 0", field=field)

    def at(self, lengths: ArrayLike) -> NDArray[np.float64]:
        """The quantity at each length."""
        where = np.asarray(lengths, dtype=np.float64)
        if self.quadratic is not None:
            constant, linear, square = self.quadratic
        else:
            known = np.array(self.points)
            if self.fit == "linear" or len(known) < 3:
                return np.maximum(_lines(where, known), 0.0)
            square, linear, constant = np.polyfit(known[:, 0], known[:, 1], 2)
        return np.maximum(constant + linear * where + square * where**2, 0.0)


def _lines(where: NDArray[np.float64], known: NDArray[np.float64]) -> NDArray[np.float64]:
    """Through all points ([n, 2]), and on beyond them."""
    left = np.clip(np.searchsorted(known[:, 0], where) - 1, 0, len(known) - 2)
    (x0, y0), (x1, y1) = known[left].T, known[left + 1].T
    return np.asarray(y0 + (where - x0) * (y1 - y0) / (x1 - x0))
