"""Published strategies in a router: loads versions, swaps them between two requests, watches how they fare.

Owns which control state is applied, the modules of published sources and the faults that the index hears of.
A version that cannot be loaded leaves the running one in place. What a request began with it keeps: the book
is replaced whole, and nobody looks twice. Sources are code: the index lets only operators publish.
"""

from __future__ import annotations

import hashlib
import linecache
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import ModuleType

import structlog

from microserve.protocol import log
from microserve.protocol.control import ControlEntry, ControlState, StrategyVersion, VersionFault
from microserve.protocol.errors import ConfigError, MeshError
from microserve.protocol.serving import Ended
from microserve.services.router.strategies.data_parallel import data_parallel
from microserve.services.router.strategy import Published, Strategy, StrategyBook, strategies_in
from microserve.services.router.version_window import End, VersionWindow

_logger = structlog.get_logger()


def load_source(source: str, name: str) -> Strategy:
    """Run a strategy's source; the strategy called ``name`` in it, or the only one, under that name.

    Raises :class:`ConfigError` when it cannot be run or holds no such strategy.
    """
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    module = ModuleType(f"microserve_published.{name}_{digest}")
    file = f"<strategy {name} {digest}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
    sys.modules[module.__name__] = module  # dataclasses and the like look their module up by name
    try:
        exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        # Whatever a source raises is about the source: it must not end a router.
        _forget(module.__name__, file)
        raise ConfigError(f"{name}: {type(error).__name__}: {error}", field="source") from error
    found = strategies_in(module)
    chosen = [each for each in found if each.name == name] or (found if len(found) == 1 else [])
    if not chosen:
        _forget(module.__name__, file)
        names = ", ".join(each.name for each in found) or "none"
        raise ConfigError(f"the source has no strategy {name} (has: {names})", field="source")
    return replace(chosen[0], name=name)


def _forget(module: str, file: str) -> None:
    sys.modules.pop(module, None)
    linecache.cache.pop(file, None)


class StrategyControl:
    """Applies control states to a book; ``version`` and ``faults`` are what the index hears."""

    def __init__(
        self,
        book: StrategyBook,
        clock: Callable[[], float],
        on_retired: Callable[[Strategy], None] = lambda strategy: None,
    ) -> None:
        """``clock``: seconds, monotonic. ``on_retired``: a source that was loaded is in force no more."""
        self.version = 0
        """Of the state that is applied; 0: none yet."""
        self.faults: list[VersionFault] = []
        """Of versions in that state."""
        self.labels: Mapping[str, Sequence[str]] = {}
        """That operators have set, by engine id; in that state too."""
        self._book = book
        self._clock = clock
        self._on_retired = on_retired
        self._loaded: dict[tuple[str, str], Strategy] = {}
        """By name and digest: a source runs once, however often its parameters change or it comes back."""
        self._windows: dict[tuple[str, int], VersionWindow] = {}
        """By name and version; 0 is what the router came with, beside a canary."""

    def apply(self, state: ControlState) -> bool:
        """Take a state over if it is newer than what is here; from the next request on it counts."""
        if state.version <= self.version:
            return False
        known = {(fault.strategy, fault.version): fault for fault in self.faults}
        faults: dict[tuple[str, int], VersionFault] = {}
        published: dict[str, Published] = {}
        for entry in state.entries:
            for version in (entry.stable, entry.canary):
                key = (entry.strategy, 0 if version is None else version.version)
                if key in known and key in self._windows:  # it runs, and has failed too often
                    faults[key] = known[key]
            published[entry.strategy] = self._publish(entry, faults)
        self.version, self.faults = state.version, list(faults.values())
        self._book.published = published
        self.labels = {each.engine: each.labels for each in state.labels}
        self._clean(state)
        _logger.info(
            log.STRATEGY_APPLIED,
            version=state.version,
            strategies={name: _versions(each) for name, each in sorted(published.items())},
        )
        return True

    def ended(self, ended: Ended, failed: bool) -> None:
        """An admitted request has ended; ``failed``: its strategy made a mistake."""
        name, version = ended.strategy, ended.strategy_version
        published = self._book.published.get(name)
        if published is None or version not in _versions(published):
            return
        window = self._window(name, version)
        window.add(_end(self._clock(), ended, failed))
        reason = window.too_many_errors()
        if not reason and published.canary is not None and version == published.canary.version:
            reason = window.slower_than(self._window(name, published.stable.version))
        is_known = any((fault.strategy, fault.version) == (name, version) for fault in self.faults)
        if reason and version > 0 and not is_known:
            self._reject(VersionFault(name, version, reason))

    def _window(self, name: str, version: int) -> VersionWindow:
        return self._windows.setdefault((name, version), VersionWindow())

    # --- one entry ---------------------------------------------------------------------------------

    def _publish(self, entry: ControlEntry, faults: dict[tuple[str, int], VersionFault]) -> Published:
        made: list[Strategy | None] = []
        for version in (entry.stable, entry.canary):
            try:
                made.append(None if version is None else self._make(entry.strategy, version))
            except MeshError as error:
                made.append(None)
                if version is not None:
                    fault = VersionFault(entry.strategy, version.version, error.detail)
                    faults[entry.strategy, version.version] = fault
                    self._log_rejected(fault)
        stable, canary = made
        if stable is None:
            running = self._book.published.get(entry.strategy) if entry.stable is not None else None
            stable = running.stable if running is not None else self._own(entry.strategy)
        return Published(stable, canary, entry.share if canary is not None else 0.0)

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
        else:
            base = self._loaded[key] = load_source(version.source, name)
        return replace(base.bind(version.parameters), version=version.version)

    def _reject(self, fault: VersionFault) -> None:
        self.faults = [*self.faults, fault]
        self._log_rejected(fault)

    def _log_rejected(self, fault: VersionFault) -> None:
        _logger.warning(
            log.STRATEGY_REJECTED, strategy=fault.strategy, version=fault.version, reason=fault.reason
        )

    def _clean(self, state: ControlState) -> None:
        """Forget the windows and the sources of versions that are not in force."""
        present = [
            (entry.strategy, version)
            for entry in state.entries
            for version in (entry.stable, entry.canary)
            if version is not None
        ]
        live = {(name, number) for name, each in self._book.published.items() for number in _versions(each)}
        self._windows = {key: window for key, window in self._windows.items() if key in live}
        digests = {(name, version.digest) for name, version in present}
        for name, digest in sorted(self._loaded.keys() - digests):
            _forget(f"microserve_published.{name}_{digest[:16]}", f"<strategy {name} {digest[:16]}>")
            self._on_retired(self._loaded.pop((name, digest)))


def _versions(published: Published) -> list[int]:
    canary = published.canary
    return [published.stable.version, *([] if canary is None else [canary.version])]


def _end(now: float, ended: Ended, failed: bool) -> End:
    """What counts of a request: times only where the strategy itself brought it to its end."""
    if failed or ended.reason not in ("stop", "length"):
        return End(now, failed)
    phases, num_output = ended.phases, ended.usage.output_tokens
    tpot_s = phases.decoded_s / (num_output - 1) if num_output > 1 else None
    return End(now, failed, phases.total_s - phases.decoded_s, tpot_s)
