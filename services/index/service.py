"""The index: who is in the mesh and which engine holds which prefix (WIRE.md 6).

Owns the ROUTER socket, the watchers, one prefix index per model and one feed per engine; who may be a member
is decided in ``membership.py``, which strategies are served in ``control.py``, which engines make an NVSHMEM
world in ``worlds.py``. Nothing but the control log is durable: engines register again with a restarted index,
and serving goes on without one.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import assert_never

import structlog

from microserve.kvcache.prefix.extension import extension
from microserve.kvcache.prefix.index import PrefixIndex
from microserve.protocol import log
from microserve.protocol.bus.codec import INDEX_REPLY, INDEX_REQUEST, decode_tokens
from microserve.protocol.bus.curve import is_operator, keys_of_role
from microserve.protocol.bus.peers import Peers
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import (
    EngineLost,
    InternalError,
    InvalidRequest,
    MeshError,
    NotPermitted,
    ProtocolViolation,
    QueueFull,
)
from microserve.protocol.messages import index as wire
from microserve.protocol.messages.engine import EngineInfo
from microserve.protocol.messages.strategy.control import Change, ControlHistory, ControlStatus
from microserve.protocol.messages.strategy.decisions import Answer, Explain
from microserve.protocol.messages.world import JoinWorld
from microserve.protocol.metrics.port import MetricsPort
from microserve.protocol.metrics.readings import Readings
from microserve.protocol.metrics.table.index import WATCHERS
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.process.pace import Pace
from microserve.protocol.process.surviving import surviving
from microserve.protocol.process.tick import at_rest
from microserve.protocol.security import rights
from microserve.protocol.security.rights import Entrance, Role
from microserve.protocol.settings.settings import BusSettings, Settings
from microserve.services.index.checks import CheckDesk
from microserve.services.index.control import ControlDesk
from microserve.services.index.control_log import ControlLog, open_control_log
from microserve.services.index.foreign import foreign_engines
from microserve.services.index.membership import Admission, Membership
from microserve.services.index.metrics import counted, counters_of, read_counters, read_index
from microserve.services.index.missing import Missing
from microserve.services.index.prefixes import PrefixIndexes
from microserve.services.index.questions import QuestionDesk
from microserve.services.index.worlds import WorldDesk
from microserve.services.links.engine import RouterIdentity
from microserve.services.links.feed import EXHAUSTED, Feed
from microserve.services.links.follow import feed_of
from microserve.services.links.snapshot import read_snapshot, reader_of

MAX_WATCHERS = 1024
MAX_REFUSED = 1024
"""Engines whose refusal is remembered, so that it is said once."""

_logger = structlog.get_logger()


class IndexService:
    """Answers on one ROUTER socket; ``tick`` every heartbeat interval does the rest."""

    def __init__(
        self,
        bus: Bus,
        *,
        address: str,
        settings: BusSettings,
        max_nbytes: int,
        incarnation: int,
        control_log: ControlLog | None = None,
        may_publish: Callable[[str], bool] | None = None,
        foreign: Sequence[EngineInfo] = (),
    ) -> None:
        """``max_nbytes`` is the hard limit of all prefix indexes together. ``control_log`` becomes ours;
        None: one in memory. ``may_publish`` is asked with a sender's key; None: everybody may. ``foreign``:
        engines that are members though they know nothing of us.

        Raises ``OSError`` when the address is taken and :class:`ConfigError` when it is exposed without keys.
        """
        self.incarnation = incarnation
        self.counters: Counter[str] = Counter()
        self._bus = bus
        self._settings = settings
        self._identity = RouterIdentity(f"index-{incarnation}", incarnation)
        self._loop = asyncio.get_running_loop()
        self._silence_s = settings.heartbeat_interval_s * settings.liveness
        interval_s = at_rest(settings.heartbeat_interval_s, settings.liveness)
        self._membership = Membership(
            interval_s=interval_s, silence_s=self._silence_s, stuck_s=settings.stuck_s
        )
        self._feeds: dict[str, Feed] = {}
        """By engine id: what is open for the life that is in."""
        self._refused: dict[str, tuple[int, str]] = {}
        """Life and reason, by engine id: of those that the log has."""
        self._missing = Missing()
        self._foreign = {info.engine_id: info for info in foreign}
        self._prefixes = PrefixIndexes(max_nbytes)
        self._watchers: Peers[bytes, None] = Peers(interval_s=interval_s, silence_s=self._silence_s)
        """By routing id."""
        self.worlds = WorldDesk(
            self._answer,
            has_keys=bool(bus.public_key),
            interval_s=interval_s,
            silence_s=self._silence_s,
        )
        self.questions = QuestionDesk(self._answer)
        self.checks = CheckDesk()
        self.pace = Pace(settings.heartbeat_interval_s, settings.liveness, self._is_busy, calm_s=0.0)
        self.control = ControlDesk(control_log or ControlLog(), self._answer, may_publish=may_publish)
        try:
            self._socket = bus.server(address, self._on_frames, Entrance.INDEX)
        except BaseException:
            self.control.close()
            raise

    @property
    def address(self) -> str:
        return self._socket.address

    def prefix_index(self, model: str) -> PrefixIndex | None:
        """The first of the model's; None while no engine serves it."""
        return self._prefixes.of_model(model)

    def _is_busy(self) -> bool:
        desks_are_idle = self.worlds.is_idle and self.control.is_idle
        return not (self._membership.are_idle and self._watchers.are_idle and desks_are_idle)

    def tick(self, next_s: float = 0.0) -> None:
        """Call every heartbeat interval, or in ``next_s`` if that is not 0."""
        now = self._loop.time()
        for info in self._foreign.values():
            self._membership.vouch(info.engine_id, now)
            if info.engine_id not in self._feeds:
                try:
                    self._admit(info, now)
                except MeshError as error:
                    self._tell_refusal(info, error)
        lost = self._membership.expire(now, next_s)
        for info, loss in lost:
            self.counters[f"lost_{loss.value}"] += 1
            self._missing.lost(info, loss, now)
            _logger.warning(log.ENGINE_LOST, engine_id=info.engine_id, reason=loss.value)
            self._forget(info.engine_id)
        if self.checks.expire(self._membership.info, now) or lost:
            self._publish()
        for watcher, _ in self._watchers.expire(now, next_s):
            self._forget_watcher(watcher.key)
        self.worlds.expire(now)
        self.control.look(now)

    def close(self) -> None:
        for engine_id in list(self._feeds):
            self._forget(engine_id)
        self._socket.close()
        self.control.close()

    # --- messages ----------------------------------------------------------------------------------

    def _on_frames(self, peer: bytes, frames: list[bytes]) -> None:
        try:
            message, bulk = INDEX_REQUEST.decode(frames)
        except ProtocolViolation as violation:
            self.counters["frames_rejected"] += 1
            _logger.warning(log.FRAME_REJECTED, error=violation.detail)
            self._answer(peer, wire.IndexFailed(0, violation.code, violation.detail))
            return
        call_id = getattr(message, "call_id", 0)
        try:
            self._on_message(peer, message, bulk)
        except MeshError as error:
            self.counters[f"refused_{error.code}"] += 1
            self._answer(peer, wire.IndexFailed(call_id, error.code, error.detail, error.field))
        except Exception:
            _logger.exception(log.BUS_HANDLER_FAILED)
            failed = InternalError("see the index's log")
            self._answer(peer, wire.IndexFailed(call_id, failed.code, failed.detail))

    def _on_message(self, peer: bytes, message: wire.IndexRequest, bulk: list[bytes]) -> None:
        now = self._loop.time()
        if not isinstance(message, Change):  # the desk of control decides that, and keeps a record of it
            rights.check(self._socket.sender_roles, type(message))
        if not getattr(message, "next_s", 0.0):
            self.pace.stir()
        match message:
            case wire.Register(call_id, info):
                self._register(info, now)
                self._answer(peer, wire.Registered(call_id, self.incarnation, paced=True))
            case wire.Beat(engine_id, incarnation, load, next_s):
                if not self._membership.beat(engine_id, incarnation, load, now, next_s):
                    self._answer(peer, wire.Unknown(engine_id))
            case wire.Deregister(engine_id, incarnation):
                if self._membership.deregister(engine_id, incarnation):
                    _logger.info(log.ENGINE_LEFT, engine_id=engine_id, incarnation=incarnation)
                    self._forget(engine_id)
                    self._publish()
            case wire.Watch():
                if message.control_version >= 0:
                    rights.check(self._socket.sender_roles, rights.APPLY_CONTROL)
                    if self.checks.take(message.watcher_id, message.checks, now):
                        self._publish()
                self._watch(peer, now, message.next_s)
                self.control.watch(peer, message)
                self.questions.watch(peer, message)
            case wire.Lookup(call_id, salt, adapter):
                self._answer(peer, wire.Matches(call_id, self._lookup(bulk, salt, adapter)))
            case wire.IndexStats(call_id):
                self._answer(peer, self._report(call_id))
            case JoinWorld():
                self.worlds.join(peer, message, now)
            case Explain():
                self._answer(peer, self.questions.ask(peer, message))
            case Answer():
                self.questions.answer(peer, message)
            case Change() | ControlStatus() | ControlHistory():
                self._answer(peer, self.control.answer(message, self._socket.sender_key))
            case _:  # a message without its case would be dropped, and its caller wait for a timeout
                assert_never(message)

    def _answer(self, peer: bytes, reply: wire.IndexReply) -> bool:
        return self._socket.send(peer, INDEX_REPLY.encode(reply))

    # --- members and watchers ----------------------------------------------------------------------

    def _register(self, info: EngineInfo, now: float) -> None:
        try:
            if self._bus.public_key and info.curve_key != self._socket.sender_key:
                raise NotPermitted("an engine registers the key that it speaks with", field="curve_key")
            if info.engine_id in self._foreign:
                raise InvalidRequest(
                    f"{info.engine_id} is the id of an engine in index.foreign", field="engine_id"
                )
            self._admit(info, now)
        except MeshError as error:
            self._tell_refusal(info, error)
            raise

    def _admit(self, info: EngineInfo, now: float) -> None:
        """A member from now on, whose events are followed. Raises a :class:`MeshError`."""
        self._prefixes.check_room(info)
        admission = self._membership.register(info, now)
        self._refused.pop(info.engine_id, None)
        self._missing.present(info)
        if admission is Admission.RENEWED:
            return
        self.counters["joined"] += 1
        _logger.info(
            log.ENGINE_JOINED, engine_id=info.engine_id, incarnation=info.incarnation, model=info.model
        )
        self._forget(info.engine_id)
        try:
            self._follow(info)
        except OSError as error:
            self._forget(info.engine_id)
            if error.errno in EXHAUSTED:  # ours: that life may come again
                self._membership.withdraw(info.engine_id)
                raise QueueFull(f"no socket for {info.engine_id} now: {error}", retry_after_s=1.0) from None
            self._membership.deregister(info.engine_id, info.incarnation)
            raise InvalidRequest(f"{info.engine_id}: {error}", field="address") from None
        finally:
            self._publish()

    def _tell_refusal(self, info: EngineInfo, error: MeshError) -> None:
        """Once: a refused engine asks for ever, and may be let in one day."""
        self._missing.refused(info, error, self._loop.time())
        if self._refused.get(info.engine_id) == (info.incarnation, error.detail):
            return
        if len(self._refused) >= MAX_REFUSED:
            del self._refused[next(iter(self._refused))]
        self._refused[info.engine_id] = (info.incarnation, error.detail)
        _logger.warning(log.ENGINE_REFUSED, engine_id=info.engine_id, code=error.code, error=error.detail)

    def _follow(self, info: EngineInfo) -> None:
        """Open what an engine's events need. Raises ``OSError`` for an address that cannot be one."""
        who, settings = self._identity, self._settings
        if not info.only_publishes:
            reader_of(self._bus, info, who, settings).end(EngineLost("only its address was to be tried"))
        index = self._prefixes.join(info)
        feed = feed_of(self._bus, info, index, lambda: read_snapshot(self._bus, info, who, settings))
        self._feeds[info.engine_id] = feed
        feed.start()

    def _forget(self, engine_id: str) -> None:
        """Close what an engine needed, and forget what it held. Unknown ids are fine."""
        feed = self._feeds.pop(engine_id, None)
        if feed is not None:
            feed.close()
            self.counters.update(counted(feed))
        self._prefixes.leave(engine_id)

    def _watch(self, peer: bytes, now: float, next_s: float) -> None:
        if self._watchers.heard(peer, now, next_s=next_s) is None:
            if len(self._watchers) >= MAX_WATCHERS:
                raise QueueFull(f"{MAX_WATCHERS} peers watch already", retry_after_s=self._silence_s)
            self._watchers.join(peer, peer, 0, None, now)  # who has two connections watches twice
        self._answer(peer, self._members())

    def _members(self) -> wire.Members:
        version, members = self._membership.version, self._membership.members()
        suspects, routers = self.checks.suspects(), self.control.routers
        return wire.Members(self.incarnation, version, members, True, suspects, routers)

    def _publish(self) -> None:
        """Tell every watcher who is in; one that cannot be told watches again when it is back."""
        if not self._watchers:
            return
        frames = INDEX_REPLY.encode(self._members())
        for watcher in self._watchers:
            if not self._socket.send(watcher.key, frames):
                self._watchers.remove(watcher.key)
                self._forget_watcher(watcher.key)

    def _forget_watcher(self, peer: bytes) -> None:
        self.control.forget(peer)
        self.questions.forget(peer)

    # --- questions ---------------------------------------------------------------------------------

    def _lookup(self, bulk: list[bytes], salt: str, adapter: str) -> dict[str, int]:
        """Over every model: an engine answers for the one that it serves."""
        if len(bulk) != 1:
            raise ProtocolViolation(f"Lookup with {len(bulk)} bulk frames, expected the prompt's tokens")
        tokens = decode_tokens(bulk[0])
        self.counters["lookups"] += 1
        return self._prefixes.lookup(tokens, salt, adapter)

    def _report(self, call_id: int) -> wire.IndexReport:
        counters = counters_of(self.counters, self._feeds.values(), self._prefixes)
        report = wire.IndexReport(
            call_id,
            num_engines=len(self._membership),
            num_blocks=self._prefixes.num_blocks,
            nbytes=self._prefixes.nbytes,
            counters=dict(counters) | {"watchers": len(self._watchers)},
            checks=self.checks.report(self._membership.info, self._loop.time()),
        )
        return self._missing.told_in(report, self._bus, self._loop.time())

    def readings(self) -> Readings:
        """What is measured here, as it is now."""
        readings, now = Readings(), self._loop.time()
        readings.add(WATCHERS, len(self._watchers))
        held = self._missing, self._prefixes, self._feeds, self.control, self.checks
        read_index(readings, self._membership, *held, now)
        read_counters(readings, counters_of(self.counters, self._feeds.values(), self._prefixes), self._bus)
        return readings


async def run_index(settings: Settings, bus: Bus, lifecycle: Lifecycle | None = None) -> None:
    """Serve until cancelled."""
    keys = keys_of_role(settings.bus.curve_dir, Role.INDEX) if settings.bus.curve_dir else None
    extension()  # built now if ever, and not when the first engine has come
    incarnation = secrets.randbits(62) | 1
    foreign = foreign_engines(settings.index.foreign, incarnation)
    control_log = await open_control_log(settings.index.control_path)
    service = IndexService(
        bus,
        address=settings.index.address,
        settings=settings.bus,
        max_nbytes=settings.index.max_mb << 20,
        incarnation=incarnation,
        control_log=control_log,
        may_publish=partial(is_operator, keys) if keys else None,
        foreign=foreign,
    )
    try:
        with MetricsPort(settings.metrics.host, settings.index.metrics_port, service.readings):
            (lifecycle or Lifecycle()).ready(service.address)
            while True:
                next_s = service.pace.next_s
                with surviving("look for silent engines"):
                    service.tick(next_s)
                awake_s = at_rest(settings.bus.heartbeat_interval_s, settings.bus.liveness)
                await service.pace.tick(next_s, awake_s)
    finally:
        service.close()
