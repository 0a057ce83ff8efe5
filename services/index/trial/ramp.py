"""How a canary gets more of the requests by itself, is promoted, or is taken back: a state machine, sans-I/O.

    share ──well for every_s, min_requests have ended, what it waits for is seen──> next share; all: promoted
      └──worse than the version beside it, in any look──> taken back

Owns how long a share has lasted while all was well: time between two looks at which every router had applied
the state. That counts up to ``MAX_LOOK_S`` for each, so neither a frozen index nor a clock that jumps brings
a canary forward, and one that goes back takes nothing away. A restarted index begins the share anew. Which
share there is, and whether it goes on, is in the log and not here (control_state.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from microserve.protocol.messages.strategy.control import (
    PROMOTE,
    ROLLBACK,
    SHARE,
    Change,
    ControlEntry,
    RouterControl,
)
from microserve.protocol.messages.strategy.scores import BETTER, NOT_WORSE, Ramp, RampState, Trial
from microserve.services.index.control_state import MAX_REASON_CHARS, Fold, Rollout
from microserve.services.index.trial.merging import trial_of

MAX_LOOK_S = 5.0
"""Two looks that are further apart count as so far."""
_WAITS = {BETTER: "until it is seen to be better", NOT_WORSE: "until it is seen to be no worse"}


@dataclass(slots=True)
class _Stage:
    """One share of one canary."""

    key: tuple[int, int, float]
    looked_at: float
    well_s: float = 0.0
    num_requests: int = 0
    """Of the canary, at the last judgement."""
    worse: str = ""
    is_seen: bool = False
    waits_for: str = ""


def once(routers: Iterable[RouterControl]) -> list[RouterControl]:
    """Who has connected anew is known twice until the old connection is missed, and counts once."""
    return list({router.router_id: router for router in routers}.values())


class Ramps:
    def __init__(self) -> None:
        self._stages: dict[str, _Stage] = {}

    def look(self, fold: Fold, routers: Sequence[RouterControl], now: float) -> list[Change]:
        """What follows from what routers say now. Call often; ``now``: seconds, monotonic."""
        going = {name: each for name, each in fold.rollouts.items() if each.ramp and each.canary}
        if not going:
            self._stages.clear()
            return []
        routers = once(routers)
        self._stages = {name: stage for name, stage in self._stages.items() if name in going}
        changes = [self._step(name, rollout, fold, routers, now) for name, rollout in going.items()]
        return [change for change in changes if change is not None]

    def states(self, fold: Fold) -> list[RampState]:
        return [
            RampState(name, fold.rollouts[name].next_share, stage.well_s, stage.num_requests, stage.waits_for)
            for name, stage in sorted(self._stages.items())
            if name in fold.rollouts and fold.rollouts[name].ramp is not None
        ]

    def _step(
        self, name: str, rollout: Rollout, fold: Fold, routers: Sequence[RouterControl], now: float
    ) -> Change | None:
        ramp, canary = rollout.ramp, rollout.canary
        assert ramp is not None and canary is not None, "the caller has looked"
        stable = 0 if rollout.stable is None else rollout.stable.version
        key = (stable, canary.version, rollout.share)
        stage = self._stages.get(name)
        if stage is None or stage.key != key:
            stage = self._stages[name] = _Stage(key, now)
        passed_s, stage.looked_at = now - stage.looked_at, now
        ill = _what_is_wrong(fold.version, routers)
        if not ill and not ramp.paused:
            stage.well_s += min(max(passed_s, 0.0), MAX_LOOK_S)
        entry = ControlEntry(name, rollout.stable, canary, rollout.share)
        _judge(stage, ramp, trial_of(entry, _all_trials(routers)))
        if stage.worse:  # also of one that is paused
            return _change(ROLLBACK, name, fold, stage.worse, version=canary.version)
        stage.waits_for = ill or _what_is_missing(stage, ramp)
        if stage.waits_for:
            return None
        share = rollout.next_share
        reason = f"{rollout.share:.4g} for {stage.well_s:.0f} s and {stage.num_requests} requests"
        if share >= 1.0:
            return _change(PROMOTE, name, fold, reason)
        return _change(SHARE, name, fold, reason, share=share)


def _all_trials(routers: Iterable[RouterControl]) -> list[Trial]:
    return [trial for router in routers for trial in router.trials]


def _what_is_wrong(version: int, routers: Sequence[RouterControl]) -> str:
    """Why this moment does not count; empty: all is well."""
    if not routers:
        return "no router watches"
    late = [router.router_id for router in routers if router.version < version]
    return f"{', '.join(late)} has not applied the last change" if late else ""


def _judge(stage: _Stage, ramp: Ramp, trial: Trial | None) -> None:
    """Only where there is something new: it costs a millisecond."""
    if trial is None or trial.canary.num_requests == stage.num_requests:
        return
    from microserve.services.index.trial import judging  # numpy, only where there are ramps

    stage.num_requests = trial.canary.num_requests
    # Each share is a comparison of its own, of requests dealt by the same lot.
    alpha = judging.ALPHA / (len(ramp.shares) + 1)
    results = judging.judge(trial.canary, trial.stable, trial.share, alpha)
    if not trial.is_sticky:  # requests of one user resemble each other: no number of them says so much
        stage.worse = judging.why_worse(results)
    seen = {BETTER: judging.is_better, NOT_WORSE: judging.is_not_worse}
    stage.is_seen = ramp.until in seen and seen[ramp.until](results)


def _what_is_missing(stage: _Stage, ramp: Ramp) -> str:
    if ramp.paused:
        return "paused"
    missing = []
    if stage.well_s < ramp.every_s:
        missing.append(f"{ramp.every_s - stage.well_s:.0f} s more")
    if stage.num_requests < ramp.min_requests:
        missing.append(f"{ramp.min_requests - stage.num_requests} requests more")
    if ramp.until and not stage.is_seen:
        missing.append(_WAITS[ramp.until])
    return ", ".join(missing)


def _change(kind: str, name: str, fold: Fold, reason: str, *, share: float = 1.0, version: int = 0) -> Change:
    """The same again while the state is the same: said twice, it is logged once."""
    change_id = f"ramp {name} {kind} {fold.version}"
    return Change(0, change_id, kind, name, share=share, version=version, reason=reason[:MAX_REASON_CHARS])
