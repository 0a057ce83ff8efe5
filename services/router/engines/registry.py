"""Which engines this router is connected to: what the index lists, minus what does not answer.

Owns the DEALER to the index (what it says of strategies goes to control.py) and every engine connection. The
index only *names* engines: its death, its restart with an empty list, or its silence drop nobody. An engine
goes when its own connection ends, when a new life of it is listed, or (once nothing of ours runs there) when
the index that listed it lists it no more. One that was lost and is still listed is taken up again at once,
whether or not the index lives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from microserve.protocol import log
from microserve.protocol.bus.codec import INDEX_REPLY, INDEX_REQUEST
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import Draining, EngineLost, MeshError, ProtocolViolation
from microserve.protocol.messages.control import ControlState
from microserve.protocol.messages.engine import EngineInfo
from microserve.protocol.messages.index import Members, Watch
from microserve.protocol.settings import BusSettings
from microserve.services.links.engine import EngineConnection, RouterIdentity
from microserve.services.router.rollout.control import StrategyControl

_logger = structlog.get_logger()

OnConnection = Callable[[EngineConnection], None]


class Registry:
    """Connections by engine id. All of them serve one model in one layout."""

    def __init__(
        self,
        bus: Bus,
        tasks: asyncio.TaskGroup,
        identity: RouterIdentity,
        settings: BusSettings,
        *,
        index_address: str,
        call_timeout_s: float,
        control: StrategyControl,
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
        self._index_address = index_address
        self._call_timeout_s = call_timeout_s
        self._control = control
        self._on_joined = on_joined
        self._on_ended = on_ended
        self._on_draining = on_draining
        self._loop = asyncio.get_running_loop()
        self._connections: dict[str, EngineConnection] = {}
        self._refused: dict[str, int] = {}
        """Incarnation by engine id: refused once, and said so once."""
        self._index_incarnation = 0
        self._index_version = -1
        self._listed: dict[str, EngineInfo] = {}
        """The last list of this life of the index."""
        self._index_heard_at: float | None = None
        self._stopping = False
        self._socket = bus.client(index_address, self._receive)

    def joined(self) -> list[EngineConnection]:
        return [connection for connection in self._connections.values() if connection.is_joined]

    def usable(self) -> list[EngineConnection]:
        """Engines that take new requests."""
        return [c for c in self.joined() if not c.is_leaving and not c.load.draining]

    @property
    def max_model_len(self) -> int:
        """Tokens that every engine can hold for one sequence; 0 without engines."""
        return min((connection.info.max_model_len for connection in self.joined()), default=0)

    async def run(self) -> None:
        """Watch the index until cancelled."""
        silence_s = self._settings.heartbeat_interval_s * self._settings.liveness
        while True:
            self._watch()
            await asyncio.sleep(self._settings.heartbeat_interval_s)
            heard_at = self._index_heard_at
            if heard_at is not None and self._loop.time() - heard_at > silence_s:
                self._index_heard_at = None
                _logger.warning(log.INDEX_LOST, address=self._index_address)
            for connection in list(self._connections.values()):
                if connection.is_leaving and connection.is_idle:
                    connection.end(Draining(f"engine {connection.engine_id} has left the mesh"))

    def _watch(self) -> None:
        control = self._control
        watch = Watch(self._identity.router_id, control.version, control.faults, control.shadows.scores())
        self._socket.send(INDEX_REQUEST.encode(watch))

    def stop(self) -> None:
        """Take up no further engine; those that are here stay until :meth:`close`."""
        self._stopping = True

    def close(self) -> None:
        self._stopping = True
        for connection in self._connections.values():
            connection.end(EngineLost("the router stops"))
        self._socket.close()

    # --- what the index says -----------------------------------------------------------------------

    def _receive(self, frames: list[bytes]) -> None:
        try:
            message, _ = INDEX_REPLY.decode(frames)
        except ProtocolViolation as error:
            _logger.warning(log.FRAME_REJECTED, address=self._index_address, error=error.detail)
            return
        if isinstance(message, ControlState) and not self._stopping:
            if self._control.apply(message):
                self._set_labels()
            self._watch()  # whoever published waits for this
            return
        if not isinstance(message, Members) or self._stopping:
            return
        if self._index_heard_at is None:
            _logger.info(log.INDEX_JOINED, address=self._index_address, incarnation=message.index_incarnation)
        self._index_heard_at = self._loop.time()
        if message.index_incarnation != self._index_incarnation:
            self._index_incarnation, self._index_version = message.index_incarnation, -1
            self._listed.clear()
        if message.version >= self._index_version:
            self._index_version = message.version
            self._take_members([member.info for member in message.members])

    def _set_labels(self) -> None:
        """From the next pick on; what runs on an engine stays there."""
        for engine_id, connection in self._connections.items():
            before, connection.set_labels = connection.labels, self._control.labels.get(engine_id)
            if list(connection.labels) != list(before):
                _logger.info(log.ENGINE_LABELLED, engine_id=engine_id, labels=list(connection.labels))

    def _take_members(self, infos: list[EngineInfo]) -> None:
        present = {info.engine_id: info for info in infos}
        for engine_id in [engine_id for engine_id in self._listed if engine_id not in present]:
            connection = self._connections.get(engine_id)
            if connection is not None and not connection.is_leaving:
                connection.is_leaving = True
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
                on_draining=self._on_draining,
            )
        except Exception as error:
            # One member with an address that no socket takes must not hide the others.
            self._refuse(info, str(error))
            return
        connection.set_labels = self._control.labels.get(info.engine_id)
        self._connections[info.engine_id] = connection
        self._tasks.create_task(self._keep(connection), name=f"engine {info.engine_id}")

    def _refuse(self, info: EngineInfo, error: str) -> None:
        if self._refused.get(info.engine_id) == info.incarnation:
            return
        self._refused[info.engine_id] = info.incarnation
        _logger.warning(
            log.ENGINE_REFUSED, engine_id=info.engine_id, incarnation=info.incarnation, error=error
        )

    def _mismatch(self, info: EngineInfo) -> str:
        """The first field in which an engine differs from those that are here; empty if none."""
        others = [c.info for c in self.joined() if c.engine_id != info.engine_id]
        for field in ("model", "block_size", "vocab_size", "layout_hash", "wire_version"):
            if any(getattr(other, field) != getattr(info, field) for other in others):
                return field
        return ""

    def _check(self, info: EngineInfo) -> None:
        field = self._mismatch(info)
        if field:
            raise EngineLost(f"engine {info.engine_id} has another {field} than the mesh", field=field)

    # --- one connection ----------------------------------------------------------------------------

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
        self.served = connection.info
        self._refused.pop(engine_id, None)
        _logger.info(log.ENGINE_JOINED, engine_id=engine_id, incarnation=connection.info.incarnation)
        self._on_joined(connection)
        try:
            reason = await connection.run()
            if not isinstance(reason, Draining):
                _logger.warning(log.ENGINE_LOST, engine_id=engine_id, error=reason.detail)
        finally:
            self._on_ended(connection)
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
