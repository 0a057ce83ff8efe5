"""Readings as Prometheus' text, by prometheus-client. Slow beside all else here: for a thread of its own.

A thread that makes text shares the interpreter with those that make tokens, so between two families it sleeps
for a moment: whoever waits for the interpreter gets it within a fraction of a millisecond.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from microserve.protocol.metrics.family import Family, Kind
from microserve.protocol.metrics.histogram import Histogram
from microserve.protocol.metrics.readings import Readings, Value

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BREATH_S = 0.0001

Names = Mapping[str, tuple[str, ...]]
"""Ours -> others' for the same; counters without ``_total``."""

_process = ProcessCollector(registry=None)


def names_of(families: Iterable[Family]) -> Names:
    """vLLM's, of families that it has too."""
    return {family.name: family.vllm for family in families if family.vllm}


def metrics_of(readings: Readings) -> Iterator[Metric]:
    """In prometheus-client's words, one by one as they are asked for."""
    for family, series in readings:
        metric = Metric(family.name, family.text, family.kind.value)
        for values, value in series:
            labels = {**readings.common, **dict(zip(family.labels, values, strict=True))}
            _add(metric, family.kind, labels, value)
        yield metric


def of_process() -> list[Metric]:
    """CPU seconds, memory and descriptors of this process."""
    return list(_process.collect())


def text_of(metrics: Iterable[Metric], names: Names | None = None) -> bytes:
    """``names``: under which those that have some are shown instead."""
    return generate_latest(_Exposed(metrics, names or {}))


def _add(metric: Metric, kind: Kind, labels: dict[str, str], value: Value) -> None:
    if not isinstance(value, Histogram):
        metric.add_sample(f"{metric.name}_total" if kind is Kind.COUNTER else metric.name, labels, value)
        return
    names = [*map(floatToGoString, value.bounds), "+Inf"]
    counts = list(accumulate(value.counts))
    for bound, count in zip(names, counts, strict=True):
        metric.add_sample(f"{metric.name}_bucket", {**labels, "le": bound}, float(count))
    metric.add_sample(f"{metric.name}_count", labels, float(counts[-1]))
    metric.add_sample(f"{metric.name}_sum", labels, value.total)


class _Exposed(Collector):
    def __init__(self, metrics: Iterable[Metric], names: Names) -> None:
        self._metrics = metrics
        self._names = names

    def collect(self) -> Iterator[Metric]:
        for metric in self._metrics:
            for name in self._names.get(metric.name, (metric.name,)):
                yield metric if name == metric.name else _renamed(metric, name)
            time.sleep(BREATH_S)


def _renamed(metric: Metric, name: str) -> Metric:
    made = Metric(name, metric.documentation, metric.type)
    made.samples = [
        Sample(name + sample.name.removeprefix(metric.name), *sample[1:]) for sample in metric.samples
    ]
    return made
