"""Requests by strategy, version and share, as their router has told their end: counts and times.

Owns the series and their bound: as many label sets as are kept, the longest unused one going first, so that a
process that lives for a year of published versions does not grow. Times are of the router's clock, from a
request's coming there.
"""

from __future__ import annotations

from collections import Counter

from microserve.protocol.messages.router import Ended
from microserve.protocol.metrics.histogram import Histogram
from microserve.protocol.metrics.readings import Readings
from microserve.protocol.metrics.table.strategies import StrategyFamilies

MAX_VERSIONS = 32
"""Label sets of strategy, version and share."""
MAX_ENGINES = 256
"""Of strategy, version and engine."""
MAX_RESULTS = 16
OTHER = "other"
"""Stands for further error codes of a version."""


class _Version:
    def __init__(self, families: StrategyFamilies) -> None:
        self.results: Counter[str] = Counter()
        self.tokens = dict.fromkeys(families.tokens, 0)
        self.num_moves = 0
        self.times = {name: Histogram(family.bounds) for name, family in families.times.items()}

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


class StrategyAccount:
    def __init__(self, families: StrategyFamilies) -> None:
        self._families = families
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
            found = _Version(self._families)
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

    def read(self, readings: Readings) -> None:
        families = self._families
        for key, version in self._versions.items():
            readings.add(families.moves, version.num_moves, *key)
            for result, count in version.results.items():
                readings.add(families.requests, count, *key, result)
            for name, tokens in version.tokens.items():
                readings.add(families.tokens[name], tokens, *key)
            for name, times in version.times.items():
                readings.add(families.times[name], times, *key)
        for place, count in self._engines.items():
            readings.add(families.engines, count, *place)
