"""An engine's place in the index: registered, kept fresh, and taken up again after every loss (WIRE.md 6).

Owns one DEALER to the index and the timer behind it. The index is a convenience of routers: its absence is
logged once and stops nothing.

Each interval a ``Beat`` tells the load, after a ``Register``: that is idempotent, and its answer is the
index's sign of life and names its incarnation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from microserve.protocol import log
from microserve.protocol.bus.address import is_out_of_reach, own_host_towards
from microserve.protocol.bus.codec import INDEX_REPLY, INDEX_REQUEST
from microserve.protocol.bus.peers import SIGNS
from microserve.protocol.bus.transport import Bus, ClientSocket
from microserve.protocol.errors import ConfigError, ProtocolViolation
from microserve.protocol.messages.engine import EngineInfo, EngineLoad
from microserve.protocol.messages.index import (
    Beat,
    Deregister,
    IndexFailed,
    IndexRequest,
    Register,
    Registered,
    Unknown,
)
from microserve.protocol.process.pace import Pace
from microserve.protocol.process.surviving import surviving
from microserve.protocol.process.tick import between_signs
from microserve.protocol.settings.settings import Settings

_logger = structlog.get_logger()


def require_reach(settings: Settings) -> None:
    """An engine whose sockets are on loopback is of no use to an index, and to routers, of another host.
    Raises :class:`ConfigError`."""
    if settings.engine.advertise:
        return
    for name in ("address", "events_address", "replay_address"):
        address = getattr(settings.engine, name)
        if is_out_of_reach(address, settings.index.address):
            raise ConfigError(
                f"engine.{name} is {address}, which only this host reaches, and the index at "
                f"{settings.index.address} is on another one; bind it to this host's address "
                f"(tcp://{own_host_towards(settings.index.address)}:0), or to every interface (tcp://0.0.0.0:0)",
                field=f"engine.{name}",
            )


class IndexClient:
    """Keeps one engine a member while :meth:`run` runs."""

    def __init__(
        self,
        bus: Bus,
        address: str,
        *,
        info: EngineInfo,
        load: Callable[[], EngineLoad],
        heartbeat_interval_s: float,
        liveness: int,
        pace: Pace | None = None,
        on_refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """``load`` is asked at every beat. ``on_refused`` is told why the index refuses the engine, whenever
        that changes; empty: it does no more.

        The index is lost after ``liveness`` intervals without an answer. ``pace``: None for an engine that is
        never idle.
        """
        self.registered = False
        self._bus = bus
        self._address = address
        self._info = info
        self._load = load
        self._interval_s = between_signs(heartbeat_interval_s, liveness)
        self._pace = pace or Pace(heartbeat_interval_s, liveness, lambda: True)
        self._is_paced = False
        """The index bears that we are silent for longer, so long as we say so."""
        self._next_s = 0.0
        """As our last beat said."""
        self._silence_s = heartbeat_interval_s * liveness
        self._loop = asyncio.get_running_loop()
        self._socket: ClientSocket | None = None
        self._closed = False
        self._lost = False
        self._index_incarnation = 0
        self._num_calls = 0
        self._heard_at = self._opened_at = self._loop.time()
        self._refused_until = 0.0
        self._refusal = ""
        """Why we are no member; said once, though asked for ever: whom we differ from may leave."""
        self._on_refused = on_refused

    async def run(self) -> None:
        """Register and beat until cancelled or closed."""
        self._heard_at = self._loop.time()
        while not self._closed:
            with surviving("beat to the index"):
                self._tick()
            await self._pace.tick(self._next_s, self._interval_s)

    def close(self) -> None:
        """Leave the mesh. A second call does nothing."""
        self._closed = True
        self.registered = False
        if self._socket is not None:
            self._send(Deregister(self._info.engine_id, self._info.incarnation))
            self._socket.close()
            self._socket = None

    def _open(self) -> None:
        """A fresh socket: what the old one still holds for an absent index is out of date."""
        if self._socket is not None:
            socket, self._socket = self._socket, None
            socket.close(lingers=False)  # a socket that lingers still connects to whoever comes
        self._opened_at = self._loop.time()
        self._socket = self._bus.client(self._address, self._on_frames)

    def _tick(self) -> None:
        now = self._loop.time()
        silence_s = max(self._silence_s, SIGNS * self._next_s)
        before_s, self._next_s = self._next_s, self._pace.next_s if self._is_paced else 0.0
        if self._socket is None:
            self._open()
        if now - self._heard_at > silence_s:
            self.registered = False
            if not self._lost:
                self._lost = True
                _logger.warning(log.INDEX_LOST, address=self._address)
            if now - self._opened_at > self._silence_s:
                self._open()
        elif before_s and not self._next_s:
            self._heard_at = now  # it need not have said anything so soon
        if now >= self._refused_until:
            self._register()
        else:  # also while refused: an engine that was stuck shows in its beats that it has moved
            self._beat()

    def _register(self) -> None:
        self._num_calls += 1
        self._send(Register(self._num_calls, self._info))
        self._beat()  # a member is known by its load from the start

    def _beat(self) -> None:
        self._send(Beat(self._info.engine_id, self._info.incarnation, self._load(), self._next_s))

    def _send(self, message: IndexRequest) -> None:
        if self._socket is not None:
            self._socket.send(INDEX_REQUEST.encode(message))

    def _on_frames(self, frames: list[bytes]) -> None:
        try:
            reply, _ = INDEX_REPLY.decode(frames)
        except ProtocolViolation as violation:
            _logger.warning(log.FRAME_REJECTED, address=self._address, error=violation.detail)
            return
        self._heard_at = self._loop.time()
        match reply:
            case Registered(_, index_incarnation, paced):
                self._is_paced = paced
                if self._lost or index_incarnation != self._index_incarnation:
                    _logger.info(log.INDEX_JOINED, address=self._address, incarnation=index_incarnation)
                self.registered = True
                self._lost = False
                self._index_incarnation = index_incarnation
                self._refused_until = 0.0
                self._set_refusal("")
            case Unknown(engine_id) if engine_id == self._info.engine_id:
                self.registered = False
                if self._heard_at >= self._refused_until:
                    self._register()
            case IndexFailed(call_id, code, detail):
                self.registered = False
                self._refused_until = self._heard_at + self._silence_s
                if detail != self._refusal:
                    _logger.warning(log.ENGINE_REFUSED, call_id=call_id, code=code, error=detail)
                self._set_refusal(detail)
            case _:
                pass

    def _set_refusal(self, reason: str) -> None:
        if reason != self._refusal:
            self._refusal = reason
            self._on_refused(reason)
