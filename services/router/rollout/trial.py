"""Canaries beside the versions that serve the other requests: what has come of both since they have their
shares. Sans-I/O.

Owns what counts: requests that came while two versions stood beside each other with the same shares, so that
who served which was by lot and the mesh was the same for both. Judges nothing: the sums of all routers
together say more (services/index/trial/).
"""

from __future__ import annotations

from collections.abc import Mapping

from microserve.protocol.messages.router import Ended
from microserve.protocol.messages.strategy.scores import Trial
from microserve.services.router.rollout.book import Published
from microserve.services.router.rollout.sums import Sums, Timing


class _Trial:
    def __init__(self, published: Published, began: float) -> None:
        self.began = began
        self.sides = {published.stable.version: Sums(), _canary(published): Sums()}


def _canary(published: Published) -> int:
    return 0 if published.canary is None else published.canary.version


def _arrangement(published: Published) -> tuple[int, int, float]:
    """Another one is another trial."""
    return published.stable.version, _canary(published), published.share


class Trials:
    """Of one router, by strategy: at most as many as there are strategies under control."""

    def __init__(self) -> None:
        self._published: Mapping[str, Published] = {}
        self._trials: dict[str, _Trial] = {}

    def take(self, published: Mapping[str, Published], now: float) -> None:
        """From ``now`` on (seconds, monotonic) these are in force."""
        before, self._published = self._published, published
        kept: dict[str, _Trial] = {}
        for name, each in published.items():
            if each.canary is None:
                continue
            old = before.get(name)
            is_same = old is not None and _arrangement(old) == _arrangement(each)
            kept[name] = self._trials[name] if is_same and name in self._trials else _Trial(each, now)
        self._trials = kept

    def add(self, now: float, ended: Ended, failed: bool, timing: Timing, num_unheld: int) -> None:
        """An admitted request has ended. One that came before the trial began is of none: of those only the
        long ones are left."""
        trial = self._trials.get(ended.strategy)
        if trial is None or now - ended.phases.total_s < trial.began:
            return
        side = trial.sides.get(ended.strategy_version)
        if side is not None:
            side.add(failed or bool(ended.code), timing, num_unheld, ended.usage)

    def told(self, now: float) -> list[Trial]:
        return [
            Trial(
                name,
                published.stable.version,
                _canary(published),
                published.share,
                bool(published.sticky_by),
                max(0.0, now - trial.began),
                *(side.told() for side in trial.sides.values()),
            )
            for name, trial in self._trials.items()
            if (published := self._published[name]).canary is not None
        ]
