"""A family of metrics: its name and what it means."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    COUNTER = "counter"
    """Only grows; ``_total`` is put behind its name."""
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Family:
    name: str
    """Of a counter without ``_total``."""
    kind: Kind
    text: str
    """A sentence."""
    labels: tuple[str, ...] = ()
    """Its own, in order; those that all of a service's families have come before (``Readings.common``)."""
    unit: str = ""
    """In words; empty: a count of what the name says."""
    bounds: tuple[float, ...] = ()
    """Of a histogram: upper ones, ascending."""
    vllm: tuple[str, ...] = ()
    """What vLLM calls the same, with the same labels and values; a counter without ``_total``."""


def counter(name: str, text: str, *labels: str, unit: str = "", vllm: str | tuple[str, ...] = ()) -> Family:
    return Family(name, Kind.COUNTER, text, labels, unit, (), _names(vllm))


def gauge(name: str, text: str, *labels: str, unit: str = "", vllm: str | tuple[str, ...] = ()) -> Family:
    return Family(name, Kind.GAUGE, text, labels, unit, (), _names(vllm))


def histogram(
    name: str,
    text: str,
    *labels: str,
    bounds: tuple[float, ...],
    unit: str = "seconds",
    vllm: str | tuple[str, ...] = (),
) -> Family:
    return Family(name, Kind.HISTOGRAM, text, labels, unit, bounds, _names(vllm))


def _names(vllm: str | tuple[str, ...]) -> tuple[str, ...]:
    names = (vllm,) if isinstance(vllm, str) else vllm
    return tuple(f"vllm:{name}" for name in names)
