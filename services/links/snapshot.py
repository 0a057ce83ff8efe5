"""One snapshot of one engine's prefix cache, for who uses the engine for nothing else (WIRE.md 4.1).

The connection serves for this alone and is a reader's: no window, no ping, gone as soon as the answer is
here. So a reader keeps nothing open, an engine soon forgets it, and no attempt meets the remains of the last.
"""

from __future__ import annotations

from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import EngineLost
from microserve.protocol.messages.engine import EngineInfo, SnapshotReply
from microserve.protocol.settings.settings import BusSettings
from microserve.services.links.engine import EngineConnection, RouterIdentity

SNAPSHOT_TIMEOUT_S = 10.0
"""A snapshot of a million blocks is tens of megabytes."""


async def read_snapshot(
    bus: Bus, info: EngineInfo, identity: RouterIdentity, settings: BusSettings
) -> tuple[SnapshotReply, bytes]:
    """The engine's cache as events. ``identity`` is who we are, in the place of a router's.

    Raises a :class:`MeshError` when it cannot be had now, ``OSError`` for an address that cannot be one."""
    connection = reader_of(bus, info, identity, settings)
    try:
        await connection.join()
        return await connection.snapshot()
    finally:
        connection.end(EngineLost("it was needed for a snapshot only"))


def reader_of(
    bus: Bus, info: EngineInfo, identity: RouterIdentity, settings: BusSettings
) -> EngineConnection:
    """A connection that is yet to be joined. Raises ``OSError`` for an address that cannot be one."""
    return EngineConnection(bus, info, identity, settings, call_timeout_s=SNAPSHOT_TIMEOUT_S, reads_only=True)
