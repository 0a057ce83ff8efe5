"""What a router has done, in numbers that only grow: for its metrics. Plain state; added to once a request or
attempt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from microserve.protocol.messages.kv.coding import Coding
from microserve.protocol.messages.router import ROUTER_PHASES, Ended
from microserve.protocol.metrics.histogram import Histogram
from microserve.protocol.metrics.readings import Readings
from microserve.protocol.metrics.strategies import OTHER, StrategyAccount
from microserve.protocol.metrics.table import router as table
from microserve.services.router.request.trail import Trail

MAX_STRATEGIES = 32
"""By name; further ones count as ``other``."""
MAX_PICKS = 256
"""Sets of strategy, label and reason: labels are what strategies make up."""
MAX_CODINGS = 64
"""Sets of profile and reason: profiles are what libraries name."""

_PHASES = (*ROUTER_PHASES, "decoded")
_FIELDS = [f"{phase}_s" for phase in _PHASES]


class RouterTally:
    def __init__(self) -> None:
        self.failovers: Counter[str] = Counter()
        """By code of what an attempt ended with that was followed by another one."""
        self._by_strategy = StrategyAccount(table.BY_STRATEGY)
        self._phases: dict[str, list[Histogram]] = {}
        self._picks: Counter[tuple[str, str, str]] = Counter()
        self._refused: Counter[str] = Counter()
        self._alone: Counter[str] = Counter()
        self._mistakes: Counter[str] = Counter()
        self._slow: Counter[str] = Counter()
        self._codings: Counter[tuple[str, str]] = Counter()
        self._coded_nbytes: Counter[str] = Counter()

    def ended(
        self, ended: Ended, trails: Sequence[Trail] = (), *, failed: bool = False, slow: bool = False
    ) -> None:
        """``failed``: its strategy has made a mistake; ``slow``: it has held the router for longer than it
        may."""
        if not ended.share:
            self._refused[ended.code or ended.reason] += 1
            return
        self._by_strategy.ended(ended)
        strategy = self._known(ended.strategy)
        if ended.alone:
            self._alone[ended.alone] += 1
        self._mistakes[strategy] += failed
        self._slow[strategy] += slow
        for trail in trails:
            for label, reason in trail.picked:
                self._pick((self._known(trail.strategy), label or "any", reason))
        if ended.reason in ("stop", "length"):
            phases = ended.phases
            for field, histogram in zip(_FIELDS, self._phases[strategy], strict=True):
                histogram.observe(getattr(phases, field))

    def coded(self, codings: Iterable[Coding]) -> None:
        """Sends that were asked to go by a codec."""
        for coding in codings:
            key = (coding.profile, coding.reason)
            if key not in self._codings and len(self._codings) >= MAX_CODINGS:
                key = (OTHER, OTHER)
            self._codings[key] += 1
            self._coded_nbytes["raw"] += coding.raw_nbytes
            self._coded_nbytes["wire"] += coding.wire_nbytes

    def _known(self, strategy: str) -> str:
        name = strategy if strategy in self._phases or len(self._phases) < MAX_STRATEGIES else OTHER
        if name not in self._phases:
            self._phases[name] = [Histogram(table.PHASES.bounds) for _ in _PHASES]
        return name

    def _pick(self, key: tuple[str, str, str]) -> None:
        self._picks[
            key if key in self._picks or len(self._picks) < MAX_PICKS else (OTHER, OTHER, key[2])
        ] += 1

    def read(self, readings: Readings) -> None:
        for strategy, histograms in self._phases.items():
            for phase, histogram in zip(_PHASES, histograms, strict=True):
                readings.add(table.PHASES, histogram, strategy, phase)
        for key, count in self._picks.items():
            readings.add(table.PICKS, count, *key)
        for coding, count in self._codings.items():
            readings.add(table.CODINGS, count, *coding)
        readings.add_each(table.CODED_NBYTES, dict(self._coded_nbytes))
        readings.add_each(table.MISTAKES, dict(self._mistakes))
        readings.add_each(table.SLOW, dict(self._slow))
        readings.add_each(table.REFUSED, dict(self._refused))
        readings.add_each(table.FAILOVERS, dict(self.failovers))
        readings.add_each(table.ALONE, dict(self._alone))
        self._by_strategy.read(readings)
