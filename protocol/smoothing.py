"""A mean that moves: what engines and routers make of measurements, one sample at a time."""

from __future__ import annotations

WEIGHT = 0.2
"""Of the newest sample."""


def smoothed(known: float, sample: float) -> float:
    """The mean after one more sample; 0 is no sample yet, so the first counts as a whole."""
    return known + WEIGHT * (sample - known) if known else float(sample)
