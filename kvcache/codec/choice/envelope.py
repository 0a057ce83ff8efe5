"""How long a transfer takes under each profile, and which one is best at which rate of the link.

Times per raw byte, over ``x = 1 / (bytes a second of the link)``; ``v`` is the mean raw size of a payload:

    encode_p  = a_enc / v + b_enc
    decode_p  = a_dec / v + b_dec + what waits at the decoder / V
    wire_p(x) = x / ratio
    T_p(x)    = overlap * max(encode, wire, decode) + (1 - overlap) * (encode + wire + decode)

One after the other, ``overlap`` is 0 and that is a line: the envelope of KVServe. In a pipeline of ``n``
payloads the slowest stage is what counts and the other two are seen once: ``overlap = 1 - 1/n``, and a
profile is the larger of two lines. Fixed costs are divided by the size of a payload, so an envelope is of one
``v``, and for one ``v`` it holds whatever the volume is.

The repository of KVServe halves encode + decode; here they count in full. Sizes are bytes and rates bytes a
second throughout. Knows numbers only; "none" is a candidate like others (cost 0, ratio 1), and callers put it
first, for the first of equals is chosen.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Stages:
    """Of one profile, for one size of payload: seconds per raw byte, and wire bytes per raw byte."""

    encode_s: float
    decode_s: float
    wire_share: float
    """1 / ratio."""

    def at(self, x: float, overlap: float) -> float:
        """Seconds per raw byte where the wire takes ``x`` seconds a byte."""
        wire = x * self.wire_share
        slowest = max(self.encode_s, wire, self.decode_s)
        return overlap * slowest + (1.0 - overlap) * (self.encode_s + wire + self.decode_s)

    def break_even(self, overlap: float) -> float:
        """Bytes a second of a link from which on raw is as fast (B* of KVServe); 0: it always is."""
        share = self.wire_share
        if share >= 1.0:
            return 0.0
        least = self._lines(overlap)
        # Raw takes x: above every line behind the last crossing, for all of them are flatter than it.
        x = max(start / (1.0 - slope) for start, slope in least)
        return 1.0 / x if x > 0.0 else float("inf")

    def _lines(self, overlap: float) -> tuple[tuple[float, float], tuple[float, float]]:
        """(start, slope) of the two whose maximum :meth:`at` is: of a codec that is the slowest, of a
        wire."""
        serial = (1.0 - overlap) * (self.encode_s + self.decode_s)
        codec = overlap * max(self.encode_s, self.decode_s) + serial
        return (codec, (1.0 - overlap) * self.wire_share), (serial, self.wire_share)


class Envelope:
    """The least of ``candidates``: borders in ``x``, and who is best between two of them."""

    def __init__(self, candidates: Sequence[Stages], overlap: float) -> None:
        """``candidates``: at least one; ``overlap``: 0 to below 1."""
        lines = np.array([each._lines(overlap) for each in candidates], dtype=np.float64)
        kept = _undominated(lines)
        lines = lines[kept]
        borders = _crossings(lines)
        edges = np.concatenate(([0.0], borders, [borders[-1] * 2 if len(borders) else 1.0]))
        best = np.argmin(_values(lines, (edges[1:] + edges[:-1]) / 2), axis=0)
        changes = np.flatnonzero(best[1:] != best[:-1])
        self.borders: list[float] = borders[changes].tolist()
        """Ascending: seconds a byte."""
        self.best: list[int] = [int(kept[each]) for each in best[[0, *(changes + 1)]]]
        """Indices of ``candidates``, one more than borders."""

    def interval(self, x: float) -> int:
        """Index into ``best``."""
        return bisect_right(self.borders, x)

    def near(self, interval: int) -> list[int]:
        """The best one there, then those of the intervals beside it: candidates, each once."""
        beside = (interval, interval - 1, interval + 1)
        return list(dict.fromkeys(self.best[each] for each in beside if 0 <= each < len(self.best)))


def _undominated(lines: NDArray[np.float64]) -> NDArray[np.intp]:
    """Who is not above another one everywhere; of equals the first. ``lines``: ``[n, 2, (start, slope)]``."""
    flat = lines.reshape(len(lines), -1)
    order = np.lexsort(flat.T[::-1])  # stable: equals stay in order
    kept: list[int] = []
    for index in order:
        if not (flat[kept] <= flat[index]).all(axis=1).any():
            kept.append(int(index))
    return np.array(sorted(kept), dtype=np.intp)


def _values(lines: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[n, len(x)]``."""
    at: NDArray[np.float64] = (lines[:, :, :1] + lines[:, :, 1:] * x).max(axis=1)
    return at


def _crossings(lines: NDArray[np.float64]) -> NDArray[np.float64]:
    """Every positive ``x`` at which a line of one meets a line of another: the best one changes nowhere
    else."""
    flat = lines.reshape(-1, 2)
    starts, slopes = flat[:, 0], flat[:, 1]
    above = np.triu_indices(len(flat), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        x = (starts[above[1]] - starts[above[0]]) / (slopes[above[0]] - slopes[above[1]])
    return np.unique(x[np.isfinite(x) & (x > 0.0)])
