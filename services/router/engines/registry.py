"""Which engines this router is connected to: what the index lists, minus what does not answer.

Owns every engine connection, and the labels that operators have given. An engine goes when its own connection
ends, when a new life of it is listed, or (once nothing of ours runs there) when the index that listed it
lists it no more. One that was lost and is still listed is taken up again at once, whether or not the index
lives. Knows neither the index's socket (links/index_watch.py) nor strategies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence

import structlog

from microserve.protocol import log
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import Draining, EngineLost, MeshError
from microserve.protocol.messages.adapter import Adapter
from microserve.protocol.messages.engine import EngineInfo
from microserve.protocol.messages.engine_info import Disagreement, disagreement
from microserve.protocol.messages.strategy.control import EngineLabels
from microserve.protocol.process.pace import Pace
from microserve.protocol.process.surviving import surviving
from microserve.protocol.process.tick import at_rest
from microserve.protocol.settings.settings import BusSettings
from microserve.services.links.engine import EngineConnection, RouterIdentity
from microserve.services.router.engines.suspects import Suspects

_logger = structlog.get_logger()

OnConnection = Callable[[EngineConnection], None]


class Registry:
    """Connections by engine id. All of them serve one model, those that exchange KV in one layout."""

    def __init__(
        self,
        bus: Bus,
        tasks: asyncio.TaskGroup,
        identity: RouterIdentity,
        settings: BusSettings,
        pace: Pace,
        *,
        call_timeout_s: float,
        on_joined: OnConnection,
        on_ended: OnConnection,
        on_draining: OnConnection,
    ) -> None:
        """``on_ended`` follows each ``on_joined`` once; ``on_draining`` comes with every heartbeat of an
        engine that drains."""
        self.served: EngineInfo | None = None
        """What the mesh serves: the last engine that joined; None until the first has."""
        self._bus = bus
        self._tasks = tasks
        self._identity = identity
        self._settings = settings
        self._pace = pace
        self._call_timeout_s = call_timeout_s
        self._on_joined = on_joined
        self._on_ended = on_ended
        self._on_draining = on_draining
        self._loop = asyncio.get_running_loop()
        self._connections: dict[str, EngineConnection] = {}
        self._refused: dict[str, int] = {}
        """Incarnation by engine id: refused once, and said so once."""
        self._listed: dict[str, EngineInfo] = {}
        """The last list of this life of the index."""
        self._labels: Mapping[str, Sequence[str]] = {}
        """That operators have set, by engine id; they outlive an engine's lives."""
        self._suspects = Suspects()
        self._stopping = False

    def joined(self) -> list[EngineConnection]:
        return [connection for connection in self._connections.values() if connection.is_joined]

    def usable(self) -> list[EngineConnection]:
        """Engines that take new requests."""
        return [c for c in self.joined() if not c.is_leaving and not c.load.draining]

    @property
    def is_busy(self) -> bool:
        """Something is under way at an engine, or one comes or leaves."""
        connections = self._connections.values()
        return any(c.is_busy or c.is_leaving or not c.is_joined for c in connections)

    @property
    def max_model_len(self) -> int:
        """Tokens that every engine can hold for one sequence; 0 without engines."""
        return min((connection.info.max_model_len for connection in self.joined()), default=0)

    @property
    def adapters(self) -> list[Adapter]:
        """Of the engines that are here, each once."""
        named = {each.name: each for connection in self.joined() for each in connection.info.adapters}
        return [named[name] for name in sorted(named)]

    async def run(self) -> None:
        """Let go of the engines that leave, until cancelled."""
        while True:
            interval_s = at_rest(self._settings.heartbeat_interval_s, self._settings.liveness)
            await self._pace.tick(self._pace.next_s, interval_s)
            for connection in list(self._connections.values()):
                if connection.is_leaving and connection.is_idle:
                    with surviving("end of an engine that left", engine_id=connection.engine_id):
                        connection.end(Draining(f"engine {connection.engine_id} has left the mesh"))

    def stop(self) -> None:
        """Take up no further engine; those that are here stay until :meth:`close`."""
        self._stopping = True

    def close(self) -> None:
        self._stopping = True
        for connection in self._connections.values():
            connection.end(EngineLost("the router stops"))

    # --- what the index says -----------------------------------------------------------------------

    def set_labels(self, labels: Iterable[EngineLabels]) -> None:
        """All that operators have given; from the next pick on. What runs on an engine stays there."""
        before = {engine_id: [*c.labels] for engine_id, c in self._connections.items()}
        self._labels = {each.engine: each.labels for each in labels}
        for engine_id, connection in self._connections.items():
            if [*connection.labels] != before[engine_id]:
                _logger.info(log.ENGINE_LABELLED, engine_id=engine_id, labels=list(connection.labels))

    def bar(self, suspects: Suspects) -> None:
        """From the next transfer on these exchange no KV, and all others do. Call at every change of them."""
        self._suspects, engine_ids = suspects, [*self._connections]
        for engine_id, connection in self._connections.items():
            connection.barred = suspects.targets_of(engine_id, engine_ids)

    def take_members(self, infos: list[EngineInfo], *, is_first: bool) -> None:
        """The index lists these; ``is_first``: of this life of it, which may not have heard of all yet."""
        if self._stopping:
            return
        if is_first:
            self._listed.clear()
        infos = [info for info in infos if not info.only_publishes]  # nothing can be asked of those
        present = {info.engine_id: info for info in infos}
        for engine_id in [engine_id for engine_id in self._listed if engine_id not in present]:
            connection = self._connections.get(engine_id)
            if connection is not None and not connection.is_leaving:
                connection.is_leaving = True
                self._pace.stir()
                _logger.info(log.ENGINE_LEFT, engine_id=engine_id, requests=len(connection.prompts))
        self._listed = present
        for info in infos:
            connection = self._connections.get(info.engine_id)
            if connection is not None and connection.info.incarnation == info.incarnation:
                connection.is_leaving = False
                continue
            if connection is not None:
                connection.end(EngineLost(f"engine {info.engine_id} was replaced by a new life of it"))
            self._connect(info)

    def _connect(self, info: EngineInfo) -> None:
        if self._refused.get(info.engine_id) == info.incarnation and self._mismatch(info):
            return
        try:
            self._check(info)
            connection = EngineConnection(
                self._bus,
                info,
                self._identity,
                self._settings,
                call_timeout_s=self._call_timeout_s,
                pace=self._pace,
                operator_labels=self._labels_of,
                on_draining=self._on_draining,
            )
        except Exception as error:
            # One member with an address that no socket takes must not hide the others.
            self._refuse(info, str(error))
            self._loop.call_later(self._settings.heartbeat_interval_s, self._return_to, info.engine_id)
            return
        self._connections[info.engine_id] = connection
        self.bar(self._suspects)
        self._tasks.create_task(self._guard(connection), name=f"engine {info.engine_id}")

    def _labels_of(self, engine_id: str) -> Sequence[str] | None:
        return self._labels.get(engine_id)

    def _refuse(self, info: EngineInfo, error: str) -> None:
        if self._refused.get(info.engine_id) == info.incarnation:
            return
        self._refused[info.engine_id] = info.incarnation
        _logger.warning(
            log.ENGINE_REFUSED, engine_id=info.engine_id, incarnation=info.incarnation, error=error
        )

    def _mismatch(self, info: EngineInfo) -> EngineLost | None:
        """Where an engine first differs from those that are here."""
        others = [c.info for c in self.joined() if c.engine_id != info.engine_id]
        for other in others:
            found = disagreement(info, other)
            for field in ("wire_version", "model"):
                if (theirs := getattr(info, field)) != (ours := getattr(other, field)):
                    found = Disagreement(field, theirs, ours)
            if found is not None:
                return EngineLost(
                    f"engine {info.engine_id} has another {found.field} than the mesh: {found.mine!r}, "
                    f"{other.engine_id} has {found.theirs!r}",
                    field=found.field,
                )
        return None

    def _check(self, info: EngineInfo) -> None:
        if mismatch := self._mismatch(info):
            raise mismatch

    # --- one connection ----------------------------------------------------------------------------

    async def _guard(self, connection: EngineConnection) -> None:
        """What goes wrong with one engine's connection ends that, and is tried again."""
        with surviving("connection", engine_id=connection.engine_id):
            await self._keep(connection)
            return
        with surviving("end of a connection", engine_id=connection.engine_id):
            connection.end(EngineLost(f"the connection to {connection.engine_id} failed"))
        self._forget(connection)
        interval_s = self._settings.heartbeat_interval_s
        self._loop.call_later(interval_s, self._return_to, connection.engine_id)

    async def _keep(self, connection: EngineConnection) -> None:
        """Join, stay, and clean up after the end; an engine that is still listed is tried again."""
        engine_id, began = connection.engine_id, self._loop.time()
        try:
            await connection.join()
            self._check(connection.info)
        except MeshError as error:
            connection.end(error)
            self._forget(connection)
            self._refuse(connection.info, error.detail)
            self._loop.call_later(self._settings.heartbeat_interval_s, self._return_to, engine_id)
            return
        others = [c.info for c in self.joined() if c is not connection]
        if not any(info.exchanges_kv and not connection.info.exchanges_kv for info in others) and (
            connection.info.revision or not any(map(connection.info.is_stranger, others))
        ):  # blocks of one that exchanges no KV, or not with those that say more, are its own affair
            self.served = connection.info
        self._refused.pop(engine_id, None)
        _logger.info(
            log.ENGINE_JOINED,
            engine_id=engine_id,
            incarnation=connection.info.incarnation,
            numerics=connection.info.numerics.name,
        )
        self._on_joined(connection)
        self._pace.stir()
        try:
            reason = await connection.run()
            if not isinstance(reason, Draining):
                _logger.warning(log.ENGINE_LOST, engine_id=engine_id, error=reason.detail)
        finally:
            self._on_ended(connection)
            self._pace.stir()
        self._forget(connection)
        # At once, but for a connection that does not last: its end may be what it leads to.
        interval_s = self._settings.heartbeat_interval_s
        pause_s = 0.0 if self._loop.time() - began > interval_s else interval_s
        self._loop.call_later(pause_s, self._return_to, engine_id)

    def _return_to(self, engine_id: str) -> None:
        info = self._listed.get(engine_id)
        if info is not None and engine_id not in self._connections and not self._stopping:
            self._connect(info)

    def _forget(self, connection: EngineConnection) -> None:
        if self._connections.get(connection.engine_id) is connection:
            del self._connections[connection.engine_id]
