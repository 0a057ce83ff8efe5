"""An engine's way into an NVSHMEM world: it asks the index until all ranks are there (WIRE.md 6.5).

Owns one DEALER to the index for that time, closed as soon as the answer is there: a repetition that comes
late must find nobody behind it. Has no deadline of its own. Shows the unique id to nobody but its caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from microserve.protocol import log
from microserve.protocol.bus.codec import INDEX_REPLY, INDEX_REQUEST
from microserve.protocol.bus.peers import Listening
from microserve.protocol.bus.transport import Bus, ClientSocket
from microserve.protocol.errors import ProtocolViolation, error_for
from microserve.protocol.messages.index import IndexFailed
from microserve.protocol.messages.world import JoinWorld, WorldJoined, WorldWaiting

_logger = structlog.get_logger()


class Rendezvous:
    def __init__(
        self,
        bus: Bus,
        address: str,
        call: JoinWorld,
        *,
        heartbeat_interval_s: float,
        liveness: int,
        on_waiting: Callable[[list[int]], None] = lambda present: None,
    ) -> None:
        """``on_waiting`` is told the ranks that are there, whenever they are others."""
        self.present: list[int] = []
        """Ranks that the index has named last."""
        self._bus = bus
        self._address = address
        self._call = call
        self._interval_s = heartbeat_interval_s
        self._silence_s = heartbeat_interval_s * liveness
        self._on_waiting = on_waiting
        self._loop = asyncio.get_running_loop()
        self._answer: asyncio.Future[WorldJoined] = self._loop.create_future()
        self._listening = Listening(heartbeat_interval_s)
        """All times here are its: a stall of ours is no silence of the index."""
        self._heard_at: float | None = None

    @property
    def has_heard(self) -> bool:
        """The index has said something."""
        return self._heard_at is not None

    async def meet(self) -> WorldJoined:
        """Wait for all ranks; as long as it takes. Raises the :class:`MeshError` that the index says."""
        socket = self._open()
        opened_at = self._listening.look(self._loop.time())
        try:
            while not self._answer.done():
                socket.send(INDEX_REQUEST.encode(self._call))
                await asyncio.wait([self._answer], timeout=self._interval_s)
                now = self._listening.look(self._loop.time())
                if now - max(opened_at, self._heard_at or 0.0) > self._silence_s:
                    # What the socket still holds for an index that is absent is out of date, and would be
                    # answered there: nobody would hear it, and the others would wait for us in the library.
                    socket.close(lingers=False)
                    socket, opened_at = self._open(), now
            return self._answer.result()
        finally:
            socket.close(lingers=False)

    def _open(self) -> ClientSocket:
        return self._bus.client(self._address, self._on_frames)

    def _on_frames(self, frames: list[bytes]) -> None:
        try:
            reply, _ = INDEX_REPLY.decode(frames)
        except ProtocolViolation as violation:
            _logger.warning(log.FRAME_REJECTED, address=self._address, error=violation.detail)
            return
        self._heard_at = self._listening.time(self._loop.time())
        if self._answer.done():
            return
        match reply:
            case WorldWaiting(world, present) if world == self._call.world:
                if present != self.present:
                    self.present = present
                    self._on_waiting(present)
            case WorldJoined(call_id) if call_id == self._call.call_id:
                self._answer.set_result(reply)
            case IndexFailed(call_id, code, detail, field) if call_id in (0, self._call.call_id):
                # 0: an index that does not know this message.
                self._answer.set_exception(error_for(code, detail, field=field))
            case _:
                pass
