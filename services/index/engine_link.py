"""The index's own line to one engine, to ask it for snapshots (WIRE.md 4).

Speaks the part of the router's protocol that a snapshot needs: ``Hello``, ``Snapshot``, ``Ping``. Owns the
DEALER socket and the calls on it; knows nothing of what a snapshot holds.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from microserve.protocol import log
from microserve.protocol.bus.calls import Calls
from microserve.protocol.bus.codec import ENGINE_REPLY, ENGINE_REQUEST
from microserve.protocol.bus.numbered import NumberedClient
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import EngineLost, ProtocolViolation, QueueFull, error_for
from microserve.protocol.messages.engine import (
    EngineInfo,
    EngineReply,
    EngineRequest,
    Failed,
    Hello,
    Ping,
    Snapshot,
    SnapshotReply,
    Welcome,
)

SNAPSHOT_TIMEOUT_S = 10.0
"""A snapshot of a million blocks is tens of megabytes."""
HELLO_TIMEOUT_S = 2.0

_logger = structlog.get_logger()

Answer = tuple[EngineReply, list[bytes]]


class EngineLink:
    """One connection to one life of one engine."""

    def __init__(self, bus: Bus, info: EngineInfo, *, link_id: str, incarnation: int) -> None:
        """``link_id`` and ``incarnation`` are who we are, in the place of a router's."""
        self._info = info
        self._link_id = link_id
        self._incarnation = incarnation
        self._calls: Calls[Answer] = Calls(info.engine_id)
        self._welcome = False
        self._socket = NumberedClient(
            bus,
            info.address,
            self._on_frames,
            self._start_over,
            server_key=info.curve_key,
            on_disconnect=lambda: self._start_over("the connection was closed"),
        )

    async def snapshot(self) -> tuple[SnapshotReply, bytes]:
        """The engine's cache as events. Raises a :class:`MeshError` when it cannot be had now."""
        try:
            if not self._welcome:
                await self._hello()
            reply, bulk = await self._call(Snapshot, SNAPSHOT_TIMEOUT_S)
            if not isinstance(reply, SnapshotReply) or len(bulk) != 1:
                raise ProtocolViolation(f"{type(reply).__name__} with {len(bulk)} bulk frames for a Snapshot")
        except BaseException:
            self._welcome = False  # whatever went wrong, the next attempt starts afresh
            raise
        return reply, bulk[0]

    def ping(self) -> None:
        """Call every heartbeat interval: an engine forgets who is silent."""
        if self._welcome:
            self._socket.send(ENGINE_REQUEST.encode(Ping(self._incarnation)))

    def close(self) -> None:
        self._socket.close()
        self._calls.fail_all(EngineLost(f"the link to {self._info.engine_id} was closed"))

    async def _hello(self) -> None:
        reply, _ = await self._call(
            lambda call_id: Hello(call_id, self._link_id, self._incarnation, credit=0), HELLO_TIMEOUT_S
        )
        if not isinstance(reply, Welcome):
            raise ProtocolViolation(f"{type(reply).__name__} for a Hello")
        expected = (self._info.engine_id, self._info.incarnation)
        if (reply.info.engine_id, reply.info.incarnation) != expected:
            # A port is reused sooner than the mesh learns that its owner died.
            raise EngineLost(
                f"{self._info.address} is now life {reply.info.incarnation} of {reply.info.engine_id}, "
                f"not life {self._info.incarnation} of {self._info.engine_id}"
            )
        self._welcome = True

    async def _call(self, make: Callable[[int], EngineRequest], timeout_s: float) -> Answer:
        call_id = self._calls.next_id()
        future = self._calls.open(call_id)
        if not self._socket.send(ENGINE_REQUEST.encode(make(call_id))):
            self._calls.fail(call_id, QueueFull(f"the queue to {self._info.engine_id} is full"))
        return await self._calls.wait(call_id, future, timeout_s)

    def _start_over(self, why: str) -> None:
        """The next snapshot says hello again; who waits for one need not wait for its timeout."""
        self._welcome = False
        self._calls.fail_all(EngineLost(f"engine {self._info.engine_id}: {why}"))

    def _on_frames(self, frames: list[bytes]) -> None:
        try:
            reply, bulk = ENGINE_REPLY.decode(frames)
        except ProtocolViolation as violation:
            _logger.warning(log.FRAME_REJECTED, engine_id=self._info.engine_id, error=violation.detail)
            return
        match reply:
            case Failed(call_id, code, detail, field, retry_after_s):
                error = error_for(code, detail, field=field, retry_after_s=retry_after_s)
                if call_id:
                    self._calls.fail(call_id, error)
                else:  # our message could not be read, or came without a Hello
                    self._welcome = False
                    self._calls.fail_all(error)
            case Welcome(call_id) | SnapshotReply(call_id):
                self._calls.resolve(call_id, (reply, bulk))
            case _:
                pass  # heartbeats; streams are none of ours
