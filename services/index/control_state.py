"""What is under control: the fold of all changes, without I/O (WIRE.md 6.4).

Owns the rules of a change and what each leaves in force. Knows no log, no clock and no peers, and nothing of
what is in a source.
"""

from __future__ import annotations

import hashlib
import keyword
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import msgspec

from microserve.protocol.errors import InvalidRequest
from microserve.protocol.messages.request.attributes import MAX_NAME_CHARS as MAX_ATTRIBUTE_NAME_CHARS
from microserve.protocol.messages.strategy.control import (
    KINDS,
    LABEL,
    LABEL_KINDS,
    MAX_CONTROL_ENTRIES,
    MAX_CONTROL_NBYTES,
    MAX_LABELLED_ENGINES,
    MAX_SOURCE_NBYTES,
    PROMOTE,
    PUBLISH,
    RAMP,
    ROLLBACK,
    SET,
    SHARE,
    Change,
    ControlEntry,
    ControlState,
    EngineLabels,
    StrategyVersion,
    fault_of_labels,
)
from microserve.protocol.messages.strategy.scores import Ramp, fault_of_ramp
from microserve.protocol.types import MAX_REQUEST_ID_CHARS

MAX_NAME_CHARS = 64
MAX_REASON_CHARS = 1000
MAX_ENGINE_ID_CHARS = 128
MAX_BEFORE = 8
"""Stable versions of a strategy that rollbacks can go back."""


def digest_of(source: str) -> str:
    """SHA-256, hex."""
    return hashlib.sha256(source.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Rollout:
    """One strategy: what is in force, and what was before."""

    stable: StrategyVersion | None = None
    canary: StrategyVersion | None = None
    share: float = 0.0
    shadow: StrategyVersion | None = None
    shadow_share: float = 0.0
    before: tuple[StrategyVersion | None, ...] = ()
    """Stable versions before this one, the latest last; None is the router's own."""
    ramp: Ramp | None = None
    """Of the canary."""

    def with_stable(self, version: StrategyVersion) -> Rollout:
        return replace(self, stable=version, before=(*self.before, self.stable)[-MAX_BEFORE:])

    def without_canary(self) -> Rollout:
        return replace(self, canary=None, share=0.0, ramp=None)

    @property
    def next_share(self) -> float:
        """That its ramp has for the canary; 0: none."""
        shares = self.ramp.shares if self.ramp is not None else []
        return next((share for share in shares if share > self.share), 0.0)

    def without_shadow(self) -> Rollout:
        return replace(self, shadow=None, shadow_share=0.0)

    @property
    def present(self) -> list[StrategyVersion]:
        """All versions in force."""
        return [version for version in (self.stable, self.canary, self.shadow) if version is not None]

    @property
    def nbytes(self) -> int:
        """At least what it adds to a message."""
        return sum(
            len(version.source.encode()) + len(repr(version.parameters).encode()) for version in self.present
        )


Labels = tuple[str, ...]
_NOTHING: Mapping[str, Rollout] = MappingProxyType({})
_NO_LABELS: Mapping[str, Labels] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Fold:
    """Everything under control after the change ``version``."""

    version: int = 0
    rollouts: Mapping[str, Rollout] = field(default_factory=lambda: _NOTHING)
    labels: Mapping[str, Labels] = field(default_factory=lambda: _NO_LABELS)
    """By engine id, where an operator has set them."""

    def state(self) -> ControlState:
        entries = [
            ControlEntry(
                name,
                rollout.stable,
                rollout.canary,
                rollout.share,
                rollout.shadow,
                rollout.shadow_share,
                rollout.ramp,
            )
            for name, rollout in sorted(self.rollouts.items())
        ]
        labels = [EngineLabels(engine, list(each)) for engine, each in sorted(self.labels.items())]
        return ControlState(self.version, entries, labels)

    def may_serve(self, strategy: str, version: int) -> bool:
        """Whether it is in force, or a rollback could restore it."""
        rollout = self.rollouts.get(strategy)
        if rollout is None:
            return False
        return any(
            each is not None and each.version == version for each in (*rollout.present, *rollout.before)
        )

    def after(self, change: Change, version: int) -> Fold:
        """With one change more, whose version is ``version``.

        Raises :class:`InvalidRequest` naming the field and the bound; then nothing has changed.
        """
        _check(change)
        if version <= self.version:
            raise InvalidRequest(f"version {version} is not above {self.version}", field="version")
        rollouts, labels = dict(self.rollouts), dict(self.labels)
        if change.kind in LABEL_KINDS:
            _label(labels, change)
        else:
            _roll_out(rollouts, change, version)
        nbytes = sum(rollout.nbytes for rollout in rollouts.values())
        nbytes += sum(len(repr(each).encode()) for each in labels.items())
        if nbytes > MAX_CONTROL_NBYTES:
            raise InvalidRequest(
                f"all sources and labels together have {nbytes} bytes, at most {MAX_CONTROL_NBYTES}",
                field="labels" if change.kind in LABEL_KINDS else "source",
            )
        return Fold(version, MappingProxyType(rollouts), MappingProxyType(labels))


def _label(labels: dict[str, Labels], change: Change) -> None:
    if change.kind == LABEL:
        labels[change.engine] = tuple(change.labels)
        if len(labels) > MAX_LABELLED_ENGINES:
            raise InvalidRequest(f"the labels of {MAX_LABELLED_ENGINES} engines are set", field="engine")
    elif labels.pop(change.engine, None) is None:
        known = ", ".join(sorted(labels)) or "none"
        raise InvalidRequest(f"no labels are set for {change.engine} (they are for: {known})", field="engine")


def _roll_out(rollouts: dict[str, Rollout], change: Change, version: int) -> None:
    name = change.strategy
    match change.kind:
        case "publish":
            rollouts[name] = _publish(rollouts.get(name, Rollout()), change, version)
        case "set":
            rollouts[name] = _set(rollouts.get(name, Rollout()), change, version)
        case "promote":
            rollouts[name] = _promote(_known(rollouts, name), change)
        case "rollback":
            rollouts[name] = _roll_back(_known(rollouts, name), change)
        case "share":
            rollouts[name] = _share(_known(rollouts, name), change)
        case "ramp":
            rollouts[name] = _ramp(_known(rollouts, name), change)
        case _:
            _known(rollouts, name)
            del rollouts[name]
    if len(rollouts) > MAX_CONTROL_ENTRIES:
        raise InvalidRequest(
            f"{len(rollouts)} strategies under control, at most {MAX_CONTROL_ENTRIES}", field="strategy"
        )


def _check(change: Change) -> None:
    """Bounds that do not depend on what is in force."""
    if change.kind not in KINDS:
        raise InvalidRequest(f"{change.kind!r} is no kind of change", field="kind")
    if change.kind in LABEL_KINDS:
        _check_labels(change)
    else:
        _check_strategy(change)
    if not 0 < len(change.change_id) <= MAX_REQUEST_ID_CHARS:
        raise InvalidRequest(f"1 to {MAX_REQUEST_ID_CHARS} characters", field="change_id")
    if change.shadow and change.kind not in (PUBLISH, PROMOTE, ROLLBACK):
        raise InvalidRequest(f"{change.kind} knows no shadow", field="shadow")
    for bound, bound_s in (("max_ttft_s", change.max_ttft_s), ("max_tpot_s", change.max_tpot_s)):
        if not 0.0 <= bound_s < math.inf or (bound_s and change.kind != PUBLISH):
            raise InvalidRequest("a bound is 0 or more seconds, with publish only", field=bound)
    if len(change.reason) > MAX_REASON_CHARS:
        raise InvalidRequest(f"at most {MAX_REASON_CHARS} characters", field="reason")
    if (change.kind == PUBLISH) != bool(change.source):
        raise InvalidRequest("publish, and nothing else, has a source", field="source")
    if len(change.source.encode()) > MAX_SOURCE_NBYTES:
        raise InvalidRequest(f"at most {MAX_SOURCE_NBYTES} bytes", field="source")
    if not 0.0 < change.share <= 1.0 or (change.share < 1.0 and change.kind not in (PUBLISH, SHARE)):
        raise InvalidRequest(f"a share is above 0 and at most 1, with publish and share only; it is "
                             f"{change.share}", field="share")  # fmt: skip
    if change.kind == SHARE and change.share == 1.0:
        raise InvalidRequest("a canary has less than all requests: promote it", field="share")
    if change.ramp is not None:
        _check_ramp(change, change.ramp)
    if change.sticky_by and not (change.kind == PUBLISH and (change.shadow or change.share < 1.0)):
        raise InvalidRequest("only a canary or a shadow is sticky", field="sticky_by")
    if len(change.sticky_by) > MAX_ATTRIBUTE_NAME_CHARS:
        raise InvalidRequest(f"at most {MAX_ATTRIBUTE_NAME_CHARS} characters", field="sticky_by")
    if change.kind == SET and not change.parameters:
        raise InvalidRequest("nothing to set", field="parameters")
    if change.kind not in (PUBLISH, SET) and change.parameters:
        raise InvalidRequest(f"{change.kind} has no parameters", field="parameters")


def _check_ramp(change: Change, ramp: Ramp) -> None:
    fault = fault_of_ramp(ramp)
    if change.kind == PUBLISH and (change.shadow or change.share == 1.0):
        fault = "only a canary has a ramp"
    elif change.kind not in (PUBLISH, RAMP):
        fault = f"{change.kind} has no ramp"
    if fault:
        raise InvalidRequest(fault, field="ramp")


def _check_strategy(change: Change) -> None:
    name = change.strategy
    if not name.isidentifier() or keyword.iskeyword(name) or len(name) > MAX_NAME_CHARS:
        raise InvalidRequest(
            f"a strategy's name is a Python identifier of at most {MAX_NAME_CHARS} characters",
            field="strategy",
        )
    for field_name in ("engine", "labels"):
        if getattr(change, field_name):
            raise InvalidRequest(f"{change.kind} has no {field_name}", field=field_name)


def _check_labels(change: Change) -> None:
    if change.strategy:
        raise InvalidRequest(f"{change.kind} has no strategy", field="strategy")
    if not 0 < len(change.engine) <= MAX_ENGINE_ID_CHARS:
        raise InvalidRequest(f"an engine's id of 1 to {MAX_ENGINE_ID_CHARS} characters", field="engine")
    fault = fault_of_labels(change.labels)
    if change.kind != LABEL and change.labels:
        fault = f"{change.kind} has no labels"
    if fault:
        raise InvalidRequest(fault, field="labels")


def _known(rollouts: Mapping[str, Rollout], name: str) -> Rollout:
    if name not in rollouts:
        known = ", ".join(sorted(rollouts)) or "none"
        raise InvalidRequest(f"{name} is not under control (there are: {known})", field="strategy")
    return rollouts[name]


def _publish(rollout: Rollout, change: Change, version: int) -> Rollout:
    made = StrategyVersion(
        version,
        change.source,
        digest_of(change.source),
        change.parameters,
        change.max_ttft_s,
        change.max_tpot_s,
        change.sticky_by,
    )
    if change.shadow:
        return replace(rollout, shadow=made, shadow_share=change.share)
    if change.share < 1.0:
        return _on_its_way(replace(rollout, canary=made, share=change.share), change.ramp)
    return rollout.with_stable(made).without_canary()


def _set(rollout: Rollout, change: Change, version: int) -> Rollout:
    old = rollout.stable or StrategyVersion(0, "", "", {})
    made = msgspec.structs.replace(old, version=version, parameters={**old.parameters, **change.parameters})
    return rollout.with_stable(made)


def _promote(rollout: Rollout, change: Change) -> Rollout:
    promoted = rollout.shadow if change.shadow else rollout.canary
    if promoted is None:
        raise InvalidRequest(
            f"it has no {'shadow' if change.shadow else 'canary'} to promote", field="strategy"
        )
    if change.shadow:
        rollout = rollout.without_shadow()
    return rollout.with_stable(promoted).without_canary()


def _share(rollout: Rollout, change: Change) -> Rollout:
    if rollout.canary is None:
        raise InvalidRequest("it has no canary", field="strategy")
    rollout = replace(rollout, share=change.share)
    return rollout if rollout.next_share else replace(rollout, ramp=None)


def _ramp(rollout: Rollout, change: Change) -> Rollout:
    if rollout.canary is None:
        raise InvalidRequest("it has no canary", field="strategy")
    return _on_its_way(rollout, change.ramp)


def _on_its_way(rollout: Rollout, ramp: Ramp | None) -> Rollout:
    rollout = replace(rollout, ramp=ramp)
    if ramp is not None and not rollout.next_share:
        raise InvalidRequest(
            f"no share of the ramp is above the canary's, which is {rollout.share:g}", field="ramp"
        )
    if ramp is not None and ramp.until and rollout.canary is not None and rollout.canary.sticky_by:
        raise InvalidRequest(
            "a sticky canary waits for no result: requests of one value are alike", field="ramp"
        )
    return rollout


def _roll_back(rollout: Rollout, change: Change) -> Rollout:
    canary, stable, shadow = rollout.canary, rollout.stable, rollout.shadow
    if shadow is not None and change.version in (0 if change.shadow else shadow.version, shadow.version):
        return rollout.without_shadow()
    if canary is not None and change.version in (0, canary.version) and not change.shadow:
        return rollout.without_canary()
    kept = tuple(each for each in rollout.before if each is None or each.version != change.version)
    if kept != rollout.before and not change.shadow:
        return replace(rollout, before=kept)  # it was given up after others had taken its place
    if stable is None or change.version not in (0, stable.version) or change.shadow:
        raise InvalidRequest("no such version is in force", field="version")
    *earlier, last = rollout.before or (None,)
    return replace(rollout, stable=last, before=tuple(earlier))
