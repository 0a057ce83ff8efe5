"""``microserve drain``: ask one engine to leave the mesh, and wait until it has.

A peer of the index (who is in the mesh) and of that engine (``Hello``, ``Drain``, its heartbeats), as a
router is. Knows nothing of how requests move elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from functools import partial

from microserve.protocol.bus.codec import INDEX_REPLY, INDEX_REQUEST
from microserve.protocol.bus.open import open_bus
from microserve.protocol.bus.transport import Bus, ClientSocket
from microserve.protocol.errors import EngineLost, MeshError, ProtocolViolation
from microserve.protocol.messages.engine import Done, Drain, EngineInfo
from microserve.protocol.messages.index import Members, Watch
from microserve.protocol.security.rights import Role
from microserve.protocol.settings.settings import Settings
from microserve.services.command.shared.control_client import silence_of_index
from microserve.services.links.engine import EngineConnection, RouterIdentity

INDEX_TIMEOUT_S = 5.0
"""An index that is there answers at once."""
MARGIN_S = 15.0
"""From ``engine.drain_s`` to giving up: an engine's last step, and the index's silence for one that died."""


class DrainFailed(Exception):
    """The text says why the engine has not left, or is not known to have."""


async def drain(
    settings: Settings, engine_id: str, timeout_s: float | None, tell: Callable[[str], None]
) -> None:
    """Drain ``engine_id`` and wait until the index lists that life of it no more; ``tell`` gets a line for
    each change of what it waits for.

    ``timeout_s`` None: ``engine.drain_s`` and some. Raises :class:`DrainFailed`, and :class:`ConfigError` for
    wrong keys.
    """
    timeout_s = settings.engine.drain_s + MARGIN_S if timeout_s is None else timeout_s
    bus = open_bus(settings, Role.OPERATOR)
    one = _Drain(settings, bus, engine_id, tell)
    try:
        async with asyncio.timeout(timeout_s):
            await one.run()
    except TimeoutError:
        if not one.is_found:
            raise DrainFailed(silence_of_index(bus, settings.index.address)) from None
        raise DrainFailed(f"engine {engine_id} has not left within {timeout_s:g} s") from None
    except MeshError as error:
        raise DrainFailed(f"engine {engine_id}: {error.detail}") from None
    finally:
        bus.close()


class _Drain:
    def __init__(self, settings: Settings, bus: Bus, engine_id: str, tell: Callable[[str], None]) -> None:
        self.is_found = False
        """The index has named the engine."""
        self._settings = settings
        self._bus = bus
        self._engine_id = engine_id
        self._tell = tell
        self._identity = RouterIdentity(f"drain-{secrets.token_hex(4)}", secrets.randbits(62) | 1)
        self._members: Members | None = None
        self._changed = asyncio.Event()
        self._num_left: int | None = None

    async def run(self) -> None:
        index = self._bus.client(self._settings.index.address, self._take_members)
        watching = asyncio.create_task(self._watch(index))
        try:
            await self._leave(*await self._find())
        finally:
            watching.cancel()
            index.close()

    async def _watch(self, index: ClientSocket) -> None:
        while True:
            index.send(INDEX_REQUEST.encode(Watch(self._identity.router_id)))
            await asyncio.sleep(self._settings.bus.heartbeat_interval_s)

    def _take_members(self, frames: list[bytes]) -> None:
        try:
            message, _ = INDEX_REPLY.decode(frames)
        except ProtocolViolation:
            return  # what answers there is no index: the wait for one ends by its timeout
        if isinstance(message, Members):
            self._members = message
            self._changed.set()

    async def _next_members(self) -> Members:
        while self._members is None:
            self._changed.clear()
            await self._changed.wait()
        members, self._members = self._members, None
        return members

    async def _find(self) -> tuple[EngineInfo, int]:
        """The engine, and the life of the index that lists it."""
        async with asyncio.timeout(INDEX_TIMEOUT_S):
            message = await self._next_members()
        infos = {member.info.engine_id: member.info for member in message.members}
        if self._engine_id not in infos:
            known = ", ".join(infos) or "none"
            raise DrainFailed(f"no engine {self._engine_id} in the mesh (there are: {known})")
        self.is_found = True
        return infos[self._engine_id], message.index_incarnation

    async def _leave(self, info: EngineInfo, index_incarnation: int) -> None:
        """Send ``Drain``; return when that life of the engine is no member any more."""
        timeout_s = self._settings.router.call_timeout_s
        connection = EngineConnection(
            self._bus,
            info,
            self._identity,
            self._settings.bus,
            call_timeout_s=timeout_s,
            reads_only=True,
            on_draining=self._tell_load,
        )
        keeping: asyncio.Task[MeshError] | None = None
        try:
            await connection.join()
            keeping = asyncio.create_task(connection.run())
            with contextlib.suppress(EngineLost):  # gone before its answer was here: the index will say so
                build = partial(Drain, incarnation=info.incarnation)
                await connection.call(build, Done, timeout_s=timeout_s)
            while True:
                message = await self._next_members()
                is_listed = any(
                    (m.info.engine_id, m.info.incarnation) == (info.engine_id, info.incarnation)
                    for m in message.members
                )
                # The list of an index that has just started is empty and means nothing.
                if not is_listed and (message.index_incarnation == index_incarnation or connection.is_ended):
                    break
        finally:
            if keeping is not None:
                keeping.cancel()
            connection.end(EngineLost("drained"))
        self._tell(f"engine {info.engine_id} has left")

    def _tell_load(self, connection: EngineConnection) -> None:
        load = connection.load
        num_left = load.num_running + load.num_waiting
        if num_left != self._num_left:
            self._num_left = num_left
            self._tell(f"engine {connection.engine_id} drains: {num_left} requests left")
