"""Published strategies in a router: loads versions, swaps them between two requests, watches how they fare.

Owns which control state is applied, the modules of published sources and the faults that the index hears of.
A version that cannot be loaded leaves the running one in place. What a request began with it keeps: the book
is replaced whole, and nobody looks twice. Sources are code: the index lets only operators publish.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial

import structlog

from microserve.protocol import log
from microserve.protocol.errors import ConfigError, MeshError
from microserve.protocol.messages.router import Ended
from microserve.protocol.messages.strategy.control import (
    ControlEntry,
    ControlState,
    StrategyVersion,
    VersionFault,
)
from microserve.protocol.strategy_source import TOP, unpacked
from microserve.services.router.authoring.definition import Strategy, strategies_in
from microserve.services.router.rollout.book import Published, StrategyBook
from microserve.services.router.rollout.pulse import Pulse
from microserve.services.router.rollout.score import Cost, ShadowBook
from microserve.services.router.rollout.scoreboard import Scoreboard
from microserve.services.router.rollout.sums import NO_TIMES, timing_of
from microserve.services.router.rollout.trial import Trials
from microserve.services.router.rollout.window import Bounds, End, VersionWindow
from microserve.services.router.source.module import Run, forget, load, run_freely
from microserve.services.router.strategies.placing.data_parallel import data_parallel

_logger = structlog.get_logger()


MAX_FAILED = 64
"""Versions that have failed here and are remembered, the newest."""
STOOD_STILL = "its code stopped a router for good, until that was killed, or crashed it"


def load_source(source: str, name: str, run: Run = run_freely) -> Strategy:
    """Run a strategy's source; the strategy called ``name`` in it, or the only one, under that name.

    Raises :class:`ConfigError` when it cannot be run or holds no such strategy.
    """
    digest = hashlib.sha256(source.encode()).hexdigest()
    files = unpacked(source)
    try:
        module = load(files, _module_of(name, digest), partial(_file_of, name, digest), run)
    except BaseException as error:
        # Whatever a source raises is about the source: it must not end a router.
        raise ConfigError(f"{name}: {type(error).__name__}: {error}", field="source") from error
    found = strategies_in(module)
    chosen = [each for each in found if each.name == name] or (found if len(found) == 1 else [])
    if not chosen:
        forget(module.__name__)
        names = ", ".join(each.name for each in found) or "none"
        raise ConfigError(f"the source has no strategy {name} (has: {names})", field="source")
    return replace(chosen[0], name=name)


def _module_of(name: str, digest: str) -> str:
    return f"microserve_published.{name}_{digest[:16]}"


def _file_of(name: str, digest: str, file: str = TOP) -> str:
    """What tracebacks say."""
    return f"<strategy {name} {digest[:16]}{'' if file == TOP else f'/{file}'}>"


class StrategyControl:
    """Applies control states to a book; ``version`` and ``faults`` are what the index hears."""

    def __init__(
        self,
        book: StrategyBook,
        clock: Callable[[], float],
        on_retired: Callable[[Strategy], None] = lambda strategy: None,
        on_applied: Callable[[list[Strategy], list[Strategy]], None] = lambda serving, shadows: None,
        run: Run = run_freely,
        culprits: Collection[str] = (),
    ) -> None:
        """``clock``: seconds, monotonic. ``on_retired``: a source that was loaded is in force no more.
        ``on_applied``: these serve now, and these are shadows. ``run`` bounds the loading of sources.
        ``culprits``: source files of which code stopped an earlier life of this router."""
        self.version = 0
        """Of the state that is applied; 0: none yet."""
        self._unloadable: list[VersionFault] = []
        """Of that state."""
        self._failed: dict[tuple[str, int], VersionFault] = {}
        """By name and version; also of those that are not in force any more."""
        self.shadows = ShadowBook()
        """How those in force fare."""
        self.scoreboard = Scoreboard()
        self.trials = Trials()
        self._book = book
        self._clock = clock
        self._pulse = Pulse()
        self._on_retired = on_retired
        self._on_applied = on_applied
        self._run = run
        self._culprits = culprits
        for strategy in book.serving():
            if strategy.function.__code__.co_filename in culprits:
                self.hung(strategy.name, strategy.version, STOOD_STILL)
        self._loaded: dict[tuple[str, str], Strategy] = {}
        """By name and digest: a source runs once, however often its parameters change or it comes back."""
        self._bounds: dict[tuple[str, int], Bounds] = {}
        self._windows: dict[tuple[str, int], VersionWindow] = {}
        """By name and version; 0 is what the router came with, beside a canary. Of those in force, and of the
        latest before them: requests that began with one may still end."""

    def apply(self, state: ControlState) -> bool:
        """Take a state over if it is newer than what is here; from the next request on it counts."""
        if state.version <= self.version:
            return False
        faults: list[VersionFault] = []
        published = {entry.strategy: self._publish(entry, faults) for entry in state.entries}
        self.version, self._unloadable = state.version, faults
        self._book.published = published
        self.trials.take(published, self._clock())
        self._clean(state)
        _logger.info(
            log.STRATEGY_APPLIED,
            version=state.version,
            strategies={name: _versions(each) for name, each in sorted(published.items())},
        )
        return True

    @property
    def faults(self) -> list[VersionFault]:
        """Versions of the state that cannot be loaded, and whatever has failed here."""
        return [*self._unloadable, *self._failed.values()]

    def hung(self, name: str, version: int, what: str) -> None:
        """A version had to be broken off: nothing more is served by it here, whatever the index says."""
        self._book.suspend(name, version, data_parallel)
        fault = VersionFault(name, version, what)
        if version > 0 and not self._is_known(fault):
            self._reject(fault)

    def beat(self, next_s: float) -> None:
        """Call regularly, again in ``next_s``: nobody is blamed for the time in which that was not done."""
        self._pulse.beat(self._clock(), next_s)

    def ended(self, ended: Ended, failed: bool, slow: bool, num_unheld: int = 0) -> None:
        """An admitted request has ended; ``failed``: its strategy made a mistake; ``slow``: it held the
        router for longer than it may; ``num_unheld``: prompt tokens that no engine held when it came."""
        now = self._clock()
        is_timed = self._pulse.has_run_since(now - ended.phases.total_s, now)
        timing = timing_of(ended, failed) if is_timed else NO_TIMES
        self.scoreboard.add(now, ended, failed, timing, num_unheld)
        self.trials.add(now, ended, failed, timing, num_unheld)
        self._judge(_end(now, ended, failed, slow, is_timed), ended)

    def _judge(self, end: End, ended: Ended) -> None:
        """Is its version to be given up?"""
        name, version = ended.strategy, ended.strategy_version
        published = self._book.published.get(name)
        is_present = published is not None and version in _versions(published)
        if not is_present and (name, version) not in self._windows:
            return
        window = self._window(name, version)
        window.add(end)
        reason = window.too_many_errors()
        if not reason and window.is_due():
            reason = window.over(self._bounds.get((name, version), Bounds()))
            canary = published.canary if published is not None else None
            if not reason and published is not None and canary is not None and version == canary.version:
                reason = window.slower_than(self._window(name, published.stable.version))
        fault = VersionFault(name, version, reason)
        if reason and version > 0 and not self._is_known(fault):
            self._reject(fault)

    def _is_known(self, fault: VersionFault) -> bool:
        key = (fault.strategy, fault.version)
        return any((known.strategy, known.version) == key for known in self.faults)

    def decided(self, shadow: Strategy, cost: Cost | None, done: Cost | None, agreed: bool) -> None:
        """A shadow has decided about a request (shadow.py)."""
        key = (shadow.name, shadow.version)
        published = self._book.published.get(shadow.name)
        if published is None or published.shadow is None or published.shadow.version != shadow.version:
            return
        self.shadows.add(key, cost, done, agreed)
        window = self._window(*key)
        window.add(End(self._clock(), cost is None))
        fault = VersionFault(*key, window.too_many_errors())
        if fault.reason and not self._is_known(fault):
            self._reject(fault)

    def _window(self, name: str, version: int) -> VersionWindow:
        return self._windows.setdefault((name, version), VersionWindow())

    # --- one entry ---------------------------------------------------------------------------------

    def _publish(self, entry: ControlEntry, faults: list[VersionFault]) -> Published:
        made: list[Strategy | None] = []
        for version in (entry.stable, entry.canary, entry.shadow):
            try:
                made.append(None if version is None else self._make(entry.strategy, version))
            except MeshError as error:
                made.append(None)
                if version is not None:
                    fault = VersionFault(entry.strategy, version.version, error.detail)
                    faults.append(fault)
                    self._log_rejected(fault)
        stable, canary, shadow = made
        if stable is None:
            running = self._book.published.get(entry.strategy) if entry.stable is not None else None
            stable = running.stable if running is not None else self._own(entry.strategy)
        return Published(
            stable,
            canary,
            entry.share if canary is not None else 0.0,
            shadow,
            entry.shadow_share if shadow is not None else 0.0,
            entry.canary.sticky_by if entry.canary is not None else "",
            entry.shadow.sticky_by if entry.shadow is not None else "",
        )

    def _own(self, name: str) -> Strategy:
        """What the router came with; under a name that it does not know, plain service."""
        return self._book.own(name) or replace(data_parallel, name=name)

    def _make(self, name: str, version: StrategyVersion) -> Strategy:
        key = (name, version.digest)
        if not version.source:
            base = self._book.own(name)
            if base is None:
                raise ConfigError(f"this router has no strategy {name} of its own", field="strategy")
        elif key in self._loaded:
            base = self._loaded[key]
        elif self._has_stopped(_file_of(name, version.digest).rstrip(">")):
            raise ConfigError(STOOD_STILL, field="source")
        else:
            base = self._loaded[key] = load_source(version.source, name, self._run)
        return replace(base.bind(version.parameters), version=version.version)

    def _has_stopped(self, files: str) -> bool:
        """Code of one of these files has stopped an earlier life of this router."""
        return any(each.startswith((f"{files}>", f"{files}/")) for each in self._culprits)

    def _reject(self, fault: VersionFault) -> None:
        self._failed[fault.strategy, fault.version] = fault
        while len(self._failed) > MAX_FAILED:
            del self._failed[next(iter(self._failed))]
        self._log_rejected(fault)

    def _log_rejected(self, fault: VersionFault) -> None:
        _logger.warning(
            log.STRATEGY_REJECTED, strategy=fault.strategy, version=fault.version, reason=fault.reason
        )

    def _clean(self, state: ControlState) -> None:
        """Forget the sources of versions that are not in force, and the windows of old ones."""
        present = [
            (entry.strategy, version)
            for entry in state.entries
            for version in (entry.stable, entry.canary, entry.shadow)
            if version is not None
        ]
        shadows = [each.shadow for each in self._book.published.values() if each.shadow is not None]
        self.shadows.keep((shadow.name, shadow.version) for shadow in shadows)
        self._on_applied(self._book.serving(), shadows)
        live = {(name, number) for name, each in self._book.published.items() for number in _versions(each)}
        late = [key for key in self._windows if key not in live]
        for key in late[: max(0, len(late) - MAX_FAILED)]:
            del self._windows[key]
        self._bounds = {
            (name, version.version): Bounds(version.max_ttft_s, version.max_tpot_s)
            for name, version in present
        }
        digests = {(name, version.digest) for name, version in present}
        for name, digest in sorted(self._loaded.keys() - digests):
            forget(_module_of(name, digest))
            self._on_retired(self._loaded.pop((name, digest)))


def _versions(published: Published) -> list[int]:
    beside = (published.canary, published.shadow)
    return [published.stable.version, *(each.version for each in beside if each is not None)]


def _end(now: float, ended: Ended, failed: bool, slow: bool, is_timed: bool) -> End:
    """What counts of a request: times only where the strategy itself brought it to its end."""
    if failed or not is_timed or ended.reason not in ("stop", "length"):
        return End(now, failed, slow=slow)
    phases, num_output = ended.phases, ended.usage.output_tokens
    tpot_s = phases.decoded_s / (num_output - 1) if num_output > 1 else None
    return End(now, failed, phases.total_s - phases.decoded_s, tpot_s, slow)
