"""Prometheus metrics by strategy, version and share: what routers say of the requests that they have ended.

Owns the series and their bound: as many label sets as are kept, the longest unused one going first, so that a
gateway that lives for a year of published versions does not grow. Times are of the router's clock, from a
request's coming there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from microserve.gateway.histogram import Histogram
from microserve.protocol.messages.router import Ended

MAX_VERSIONS = 32
"""Label sets of strategy, version and share."""
MAX_ENGINES = 256
"""Of strategy, version and engine."""
MAX_RESULTS = 16
OTHER = "other"
"""Stands for further error codes of a version."""

_LABELS = ("strategy", "version", "share")
_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
_TIMES = {
    "time_to_first_token": "Router's receipt to first token, by strategy.",
    "time_per_output_token": "Of each output token after the first, by strategy.",
    "job_completion": "Router's receipt to the end, by strategy.",
}
_TOKENS = {
    "prompt_tokens": "Prompt tokens, by strategy.",
    "cached_tokens": "Those of them that the engine's cache had.",
    "received_tokens": "Those of them that another engine computed.",
    "output_tokens": "Output tokens, by strategy.",
}


class _Version:
    def __init__(self) -> None:
        self.results: Counter[str] = Counter()
        self.tokens = dict.fromkeys(_TOKENS, 0)
        self.num_moves = 0
        self.times = {name: Histogram(_BOUNDS) for name in _TIMES}

    def add(self, ended: Ended) -> None:
        result = ended.code or ended.reason
        if result not in self.results and len(self.results) >= MAX_RESULTS:
            result = OTHER
        self.results[result] += 1
        self.num_moves += ended.num_moves
        usage, phases = ended.usage, ended.phases
        for name in self.tokens:
            self.tokens[name] += getattr(usage, name)
        if ended.reason not in ("stop", "length"):
            return
        num_output = usage.output_tokens
        self.times["job_completion"].observe(phases.total_s)
        if num_output:
            self.times["time_to_first_token"].observe(phases.total_s - phases.decoded_s)
        if num_output > 1:
            self.times["time_per_output_token"].observe(phases.decoded_s / (num_output - 1))


class StrategyMetrics:
    def __init__(self) -> None:
        self._versions: dict[tuple[str, str, str], _Version] = {}
        """The longest unused first."""
        self._engines: dict[tuple[str, str, str], int] = {}

    def ended(self, ended: Ended) -> None:
        """A router has told the end of a request; one that it did not admit is of no strategy."""
        if not ended.share:
            return
        version = str(ended.strategy_version)
        key = (ended.strategy, version, ended.share)
        found = self._versions.pop(key, None)
        if found is None:
            found = _Version()
            if len(self._versions) >= MAX_VERSIONS:
                del self._versions[next(iter(self._versions))]
        self._versions[key] = found
        found.add(ended)
        if ended.engines:
            place = (ended.strategy, version, ended.engines[-1])
            count = self._engines.pop(place, 0)
            if not count and len(self._engines) >= MAX_ENGINES:
                del self._engines[next(iter(self._engines))]
            self._engines[place] = count + 1

    def families(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "microserve_strategy_requests", "Requests by strategy and result.", labels=[*_LABELS, "result"]
        )
        moves = CounterMetricFamily(
            "microserve_strategy_moves", "Moves to another engine in a request's midst.", labels=_LABELS
        )
        for key, version in self._versions.items():
            moves.add_metric(key, version.num_moves)
            for result, count in version.results.items():
                requests.add_metric((*key, result), count)
        yield requests
        yield moves
        for name, text in _TOKENS.items():
            tokens = CounterMetricFamily(f"microserve_strategy_{name}", text, labels=_LABELS)
            for key, version in self._versions.items():
                tokens.add_metric(key, version.tokens[name])
            yield tokens
        for name, text in _TIMES.items():
            times = HistogramMetricFamily(f"microserve_strategy_{name}_seconds", text, labels=_LABELS)
            for key, version in self._versions.items():
                version.times[name].add_to(times, key)
            yield times
        engines = CounterMetricFamily(
            "microserve_strategy_engine_requests",
            "Requests by strategy and the engine that generated.",
            labels=("strategy", "version", "engine"),
        )
        for place, count in self._engines.items():
            engines.add_metric(place, count)
        yield engines
