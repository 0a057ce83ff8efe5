"""The index's desk for control: logs changes, tells the routers, keeps who runs what (WIRE.md 6.4).

Owns the right to publish and the watchers that run strategies. Knows no strategy: what a source does is for
those who check it before, and for the routers that run it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import structlog

from microserve.protocol import log
from microserve.protocol.errors import MeshError, NotPermitted
from microserve.protocol.messages import index as wire
from microserve.protocol.messages.host import HostFacts
from microserve.protocol.messages.strategy.control import (
    LABEL_KINDS,
    RAMP,
    ROLLBACK,
    Change,
    Changed,
    ControlHistory,
    ControlRecords,
    ControlReport,
    ControlStatus,
    RouterControl,
)
from microserve.protocol.process.surviving import surviving
from microserve.services.index.control_log import MAX_VERSION, ControlLog
from microserve.services.index.control_state import MAX_REASON_CHARS, digest_of
from microserve.services.index.trial.ramp import Ramps, once

LOCAL = "local"
NUM_CLOCKS = 8
"""Messages of a router by which its clock is judged."""

Send = Callable[[bytes, wire.IndexReply], bool]
_logger = structlog.get_logger()


class ControlDesk:
    def __init__(
        self,
        control_log: ControlLog,
        send: Send,
        *,
        may_publish: Callable[[str], bool] | None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """``may_publish`` is asked with a sender's public key; None: without keys, everybody here may."""
        self._log = control_log
        self._send = send
        self._may_publish = may_publish
        self._routers: dict[bytes, RouterControl] = {}
        self._clocks_off_s: dict[bytes, deque[float]] = {}
        """Of routers, as their last few messages say: each of them was under way for a while."""
        self._wall_clock = wall_clock
        self._ramps = Ramps()
        self._highest_seen = 0
        """Of the versions that routers have: a log that was lost must not use them again."""
        fold = control_log.fold
        _logger.info(
            log.CONTROL_OPENED,
            durable=control_log.is_durable,
            version=fold.version,
            strategies=sorted(fold.rollouts),
            labelled=sorted(fold.labels),
        )

    # --- publishers --------------------------------------------------------------------------------

    def answer(self, message: Change | ControlStatus | ControlHistory, key: str) -> wire.IndexReply:
        """``key``: the sender's public key, empty without. Raises a :class:`MeshError` naming the field."""
        match message:
            case Change():
                return Changed(message.call_id, self._change(message, key))
            case ControlStatus(call_id):
                routers = sorted(once(self._routers.values()), key=lambda router: router.router_id)
                fold = self._log.fold
                ramps = self._ramps.states(fold)
                return ControlReport(call_id, fold.state(), routers, self._log.is_durable, ramps)
            case ControlHistory(call_id, strategy, limit):
                return ControlRecords(call_id, self._log.records(strategy, limit))

    def _change(self, change: Change, key: str) -> int:
        who = LOCAL if self._may_publish is None else key or "unknown"
        try:
            if self._may_publish is not None and not (key and self._may_publish(key)):
                raise NotPermitted("this key has no right to change what is served", field="operators")
            return self._append(change, who)
        except MeshError as error:
            _logger.warning(
                log.STRATEGY_REFUSED,
                who=who,
                kind=change.kind,
                strategy=change.strategy,
                engine_id=change.engine,
                digest=digest_of(change.source),
                field=error.field,
                error=error.detail,
            )
            raise

    def _append(self, change: Change, who: str) -> int:
        before = self._log.fold.version
        version = self._log.append(change, who, above=self._highest_seen)
        if version > before:
            self._tell_of(change, version, who)
            for peer in list(self._routers):
                if not self._send(peer, self._log.fold.state()):
                    self.forget(peer)  # nobody waits for what is gone; one that is back says so
        return version

    def _tell_of(self, change: Change, version: int, who: str) -> None:
        """The audit event of a change."""
        if change.kind in LABEL_KINDS:
            _logger.info(
                log.ENGINE_LABELLED,
                version=version,
                who=who,
                kind=change.kind,
                engine_id=change.engine,
                labels=change.labels,
                reason=change.reason,
            )
            return
        _logger.info(
            log.STRATEGY_ROLLED_BACK if change.kind == ROLLBACK else log.STRATEGY_PUBLISHED,
            version=version,
            who=who,
            kind=change.kind,
            strategy=change.strategy,
            digest=digest_of(change.source) if change.source else "",
            parameters=change.parameters,
            share=change.share,
            reason=change.reason,
        )

    # --- routers -----------------------------------------------------------------------------------

    def watch(self, peer: bytes, message: wire.Watch) -> None:
        """What a watcher says of itself, and what it has missed."""
        if message.control_version < 0:
            return
        self._routers[peer] = RouterControl(
            message.watcher_id,
            message.control_version,
            message.faults,
            message.shadows,
            message.serves,
            message.default_strategy,
            message.trials,
            message.gateways,
            message.version,
            message.host,
            self._clock_off_s(peer, message.host),
        )
        if message.control_version < MAX_VERSION:
            self._highest_seen = max(self._highest_seen, message.control_version)
        for fault in message.faults:
            if self._log.fold.may_serve(fault.strategy, fault.version):
                # The version that it names is taken back once, whoever says so and how often, and does not
                # return by the rollback of another.
                change = Change(
                    0,
                    f"fault {fault.strategy} {fault.version} {self._log.fold.version}",
                    ROLLBACK,
                    fault.strategy,
                    version=fault.version,
                    reason=fault.reason[:MAX_REASON_CHARS],
                )
                self._append(change, f"router {message.watcher_id}")
        if message.control_version < self._log.fold.version:
            self._send(peer, self._log.fold.state())

    def _clock_off_s(self, peer: bytes, host: HostFacts) -> float:
        if not host.wall_s:
            return 0.0
        seen = self._clocks_off_s.setdefault(peer, deque(maxlen=NUM_CLOCKS))
        seen.append(host.wall_s - self._wall_clock())
        return max(seen)

    @property
    def version(self) -> int:
        """Of the log."""
        return self._log.fold.version

    @property
    def routers(self) -> list[str]:
        """By name, each once."""
        return sorted({router.router_id for router in self._routers.values()})

    @property
    def is_durable(self) -> bool:
        """The log survives the index."""
        return self._log.is_durable

    @property
    def num_behind(self) -> int:
        """Routers that have not applied all of it."""
        return sum(router.version < self.version for router in self._routers.values())

    @property
    def is_idle(self) -> bool:
        """Nothing goes on by itself."""
        return not any(rollout.ramp for rollout in self._log.fold.rollouts.values())

    def look(self, now: float) -> None:
        """Call regularly: ramps go on. ``now``: seconds, monotonic."""
        fold = self._log.fold
        for change in self._ramps.look(fold, list(self._routers.values()), now):
            with surviving("ramp", strategy=change.strategy):
                self._append(change, RAMP)

    def forget(self, peer: bytes) -> None:
        self._routers.pop(peer, None)
        self._clocks_off_s.pop(peer, None)

    def close(self) -> None:
        self._log.close()
