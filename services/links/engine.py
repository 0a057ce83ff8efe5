"""One connection to one life of one engine: calls, token streams, liveness. A router's, or a reader's.

Owns the DEALER socket and everything that waits for the engine. It ends once, by loss (silence, no progress,
another incarnation, a refusal, a lost message, a closed socket) or by ``end``, and then all that waited fails
with ``EngineLost``; a new life of the engine is a new connection. Knows neither strategies nor what a
request holds (scope.py does).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, assert_never

import structlog

from microserve.protocol import log
from microserve.protocol.bus.calls import Calls
from microserve.protocol.bus.codec import ENGINE_REPLY, ENGINE_REQUEST
from microserve.protocol.bus.credit import CreditMeter
from microserve.protocol.bus.numbered import NumberedClient
from microserve.protocol.bus.peers import Loss, Peers
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import (
    Draining,
    EngineLost,
    MeshError,
    PeerError,
    ProtocolViolation,
    error_for,
)
from microserve.protocol.messages import engine as wire
from microserve.protocol.process.pace import Pace
from microserve.protocol.process.tick import between_signs, until_tick
from microserve.protocol.settings.settings import BusSettings
from microserve.services.links.abort import Aborts
from microserve.services.links.stream import TokenStreams

_logger = structlog.get_logger()

SILENCE_MARGIN_S = 0.01
"""The look for a silent engine is so much after it is due: no timer is exact."""

Answer = tuple[wire.EngineReply, list[bytes]]
"""A reply and its bulk frames."""
Build = Callable[[int], wire.EngineRequest]
"""Makes the message from the call id that it is given."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RouterIdentity:
    router_id: str
    incarnation: int


class EngineConnection:
    """:meth:`join`, then keep :meth:`run` running; usable while ``is_joined``."""

    def __init__(
        self,
        bus: Bus,
        info: wire.EngineInfo,
        identity: RouterIdentity,
        settings: BusSettings,
        *,
        call_timeout_s: float,
        reads_only: bool = False,
        pace: Pace | None = None,
        operator_labels: Callable[[str], Sequence[str] | None] = lambda engine_id: None,
        on_draining: Callable[[EngineConnection], None] = lambda connection: None,
    ) -> None:
        """``reads_only``: nothing will be generated. ``pace``: None for one that is never idle.
        ``operator_labels``: those given to an engine of that id, None where none are. ``on_draining`` is
        called with every heartbeat of an engine that drains.

        Raises ``OSError`` for an address that cannot be one."""
        self.info = info
        self.engine_id = info.engine_id
        self.load = wire.EngineLoad()
        """As of the last heartbeat."""
        self.load_at = 0.0
        """When that came, by the loop's clock."""
        self.prompts: set[str] = set()
        """Requests that use this engine (scope.py keeps it)."""
        self.is_leaving = False
        """Not to be used by new requests."""
        self.barred: Collection[str] = frozenset()
        """Engines to which it may send no KV, by what checks have found; the registry keeps it."""
        self.streams = TokenStreams()
        self._identity = identity
        self._interval_s = settings.heartbeat_interval_s
        self._ping_interval_s = between_signs(settings.heartbeat_interval_s, settings.liveness)
        self._silence_s = settings.heartbeat_interval_s * settings.liveness
        self._call_timeout_s = call_timeout_s
        self._operator_labels = operator_labels
        self._on_draining = on_draining
        self._peer: Peers[str, None] = Peers(
            interval_s=self._ping_interval_s, silence_s=self._silence_s, stuck_s=settings.stuck_s
        )
        """The engine, from its welcome on."""
        self._pace = pace or Pace(self._interval_s, settings.liveness, lambda: True)
        self._is_paced = False
        """It bears that we are silent for longer, so long as we say so."""
        self._next_s = 0.0
        """As our last ping said."""
        self._meter = CreditMeter(0 if reads_only else settings.credit)
        self._calls: Calls[Answer] = Calls(f"engine {info.engine_id}")
        self._aborts = Aborts()
        self._loop = asyncio.get_running_loop()
        self._joined = False
        self._lost: MeshError | None = None
        self._news = asyncio.Event()
        """It has ended, or there is something to do."""
        self._socket = NumberedClient(
            bus,
            info.address,
            self._receive,
            self._take_loss,
            server_key=info.curve_key,
            on_disconnect=self._take_disconnect,
        )

    @property
    def labels(self) -> Sequence[str]:
        """An operator's, or else those that it announces."""
        given = self._operator_labels(self.engine_id)
        return self.info.labels if given is None else given

    @property
    def is_joined(self) -> bool:
        return self._joined and self._lost is None

    @property
    def is_ended(self) -> bool:
        return self._lost is not None

    @property
    def is_idle(self) -> bool:
        """No request uses the engine and every abort is confirmed."""
        return not (self.prompts or self._aborts)

    @property
    def has_waiters(self) -> bool:
        """Somebody waits for an answer or for tokens."""
        return bool(self._calls or self.streams)

    # --- life --------------------------------------------------------------------------------------

    async def join(self) -> None:
        """Say hello. Raises a :class:`MeshError`, and is ended, when the engine cannot be used."""
        try:
            hello = partial(
                wire.Hello,
                router_id=self._identity.router_id,
                incarnation=self._identity.incarnation,
                credit=self._meter.window,
            )
            welcome = await self.call(hello, wire.Welcome, timeout_s=self._silence_s)
            if welcome.info.incarnation != self.info.incarnation or welcome.info.engine_id != self.engine_id:
                raise EngineLost(f"{self.info.address} is another life of {self.engine_id} by now")
        except MeshError as error:
            self.end(error)
            raise
        self.info, self.load, self.load_at = welcome.info, welcome.load, self._loop.time()
        self._is_paced = welcome.paced
        self._peer.join(self.engine_id, self.engine_id, self.info.incarnation, None, self.load_at)
        self._joined = True

    async def run(self) -> MeshError:
        """After :meth:`join`: keep the connection alive until it ends; returns why."""
        while True:
            self._news.clear()
            next_s = 0.0 if self.is_busy or not self._is_paced else self._pace.next_s
            self._check_liveness(next_s)
            if self._lost is None:
                self._ping(next_s)
                self._repeat_aborts()
            if self._lost is not None:
                return self._lost
            # Not an interval later than it can be known; and an abort is to be repeated soon.
            wait_s = self._peer.silent_in(self.engine_id, self._loop.time()) + SILENCE_MARGIN_S
            if self._aborts:
                wait_s = min(wait_s, until_tick(self._loop.time(), self._interval_s))
            await self._pace.tick(next_s, self._ping_interval_s, self._news, at_most_s=wait_s)

    @property
    def is_busy(self) -> bool:
        """Something is under way here."""
        return not self.is_idle or self.has_waiters

    def _ping(self, next_s: float) -> None:
        """Once there is something to do the engine has to answer as soon as any (WIRE.md 3.5)."""
        if self._next_s and not next_s:
            self._peer.rouse(self.engine_id, self._loop.time())
        self._next_s = next_s
        self._send(wire.Ping(self._identity.incarnation, next_s))

    def end(self, reason: MeshError) -> None:
        """Everything that waits fails with ``reason`` and the socket is closed. The first reason counts."""
        if self._lost is not None:
            return
        self._lost = reason
        self._socket.close()
        self._calls.fail_all(self._loss(reason))
        self.streams.fail_all(lambda: self._loss(reason))
        self._aborts.clear()
        self._news.set()

    def _take_loss(self, detail: str) -> None:
        self.end(EngineLost(f"engine {self.engine_id}: {detail}"))

    def _take_disconnect(self) -> None:
        if (self.is_leaving and self.is_idle) or (self.load.draining and not self.has_waiters):
            self.end(Draining(f"engine {self.engine_id} has left the mesh"))
        else:
            self.end(EngineLost(f"engine {self.engine_id} closed the connection"))

    def _loss(self, reason: MeshError) -> EngineLost:
        loss = EngineLost(reason.detail)
        loss.suspect = self.engine_id
        return loss

    def _check_liveness(self, next_s: float) -> None:
        for _, loss in self._peer.expire(self._loop.time(), next_s):
            why = {Loss.SILENT: "fell silent", Loss.STUCK: "has work and makes no progress"}[loss]
            self.end(EngineLost(f"engine {self.engine_id} {why}"))

    # --- calls -------------------------------------------------------------------------------------

    def begin(self, build: Build, *bulk: bytes) -> tuple[int, asyncio.Future[Answer]]:
        """Send a call whose answer the caller awaits itself. Raises ``EngineLost`` when the connection ended.

        The future fails with the engine's error or with ``EngineLost``.
        """
        if self._lost is not None:
            raise self._loss(self._lost)
        call_id = self._calls.next_id()
        future = self._calls.open(call_id)
        future.add_done_callback(_retrieve)
        self._send(build(call_id), *bulk)
        return call_id, future

    async def wait(self, call_id: int, future: asyncio.Future[Answer], timeout_s: float) -> Answer:
        return await self._calls.wait(call_id, future, max(0.0, timeout_s))

    def fail(self, call_id: int, error: MeshError) -> None:
        """End a call from our side; its answer, if one comes, is dropped."""
        self._calls.fail(call_id, error)

    async def call(self, build: Build, expected: type[T], *bulk: bytes, timeout_s: float) -> T:
        """Send and wait for the answer. Raises the engine's error, ``EngineLost`` or ``DeadlineExceeded``."""
        return self.expect((await self.wait(*self.begin(build, *bulk), timeout_s))[0], expected)

    def expect(self, reply: wire.EngineReply, expected: type[T]) -> T:
        if not isinstance(reply, expected):
            raise PeerError(f"{self.engine_id} answered {type(reply).__name__}, not {expected.__name__}")
        return reply

    async def snapshot(self) -> tuple[wire.SnapshotReply, bytes]:
        """The engine's prefix cache as events would have built it. Raises as :meth:`call`."""
        call = self.begin(wire.Snapshot)
        reply, bulk = await self.wait(*call, self._call_timeout_s)
        snapshot = self.expect(reply, wire.SnapshotReply)
        if len(bulk) != 1:
            raise PeerError(f"{self.engine_id} sent a snapshot with {len(bulk)} bulk frames, expected 1")
        return snapshot, bulk[0]

    # --- aborts ------------------------------------------------------------------------------------

    def abort(self, request_id: str) -> None:
        """Make the engine drop everything of a request: sent now and again until it is confirmed."""
        if self._lost is not None:
            return
        call_id = self._calls.next_id()
        self._aborts.sent(call_id, request_id, self._loop.time())
        self._send(wire.Abort(call_id, request_id))

    def _repeat_aborts(self) -> None:
        for request_id in self._aborts.take_due(self._loop.time() - 2 * self._interval_s, self.prompts):
            self.abort(request_id)

    # --- messages ----------------------------------------------------------------------------------

    def _send(self, message: wire.EngineRequest, *bulk: bytes) -> None:
        """A queue that is full up to its high-water mark means that nobody reads at the other end."""
        if self._next_s and not isinstance(message, wire.Ping):
            self._pace.stir()
            self._ping(0.0)
        if not self._socket.send(ENGINE_REQUEST.encode(message, *bulk)):
            self.end(EngineLost(f"engine {self.engine_id} takes no messages"))

    def _receive(self, frames: list[bytes]) -> None:
        if self._lost is not None:
            return
        try:
            message, bulk = ENGINE_REPLY.decode(frames)
        except ProtocolViolation as violation:
            _logger.warning(log.FRAME_REJECTED, engine_id=self.engine_id, error=violation.detail)
            return
        if not isinstance(message, wire.Failed):  # a new life of the engine may refuse what the old one got
            self._take_sign(message.next_s if isinstance(message, wire.Heartbeat) else None)
        match message:
            case wire.Deltas():
                self.streams.push(message.deltas)
                credit = self._meter.consumed()
                if credit:
                    self._send(wire.Credit(credit))
            case wire.Heartbeat():
                self._take_heartbeat(message)
            case wire.Failed(code=ProtocolViolation.code) | wire.Failed(call_id=0):
                # It does not know us (any more), so it has dropped whatever it had of ours; or it could not
                # read what we sent, and does not know which call that was.
                self.end(EngineLost(f"engine {self.engine_id} refuses this connection: {message.detail}"))
            case wire.Failed():
                self._aborts.confirm(message.call_id)
                error = error_for(
                    message.code, message.detail, field=message.field, retry_after_s=message.retry_after_s
                )
                error.reporter = self.engine_id
                self._calls.fail(message.call_id, error)
            case (
                wire.Welcome()
                | wire.Granted()
                | wire.Sent()
                | wire.Accepted()
                | wire.Committed()
                | wire.Done()
                | wire.EngineStats()
                | wire.SnapshotReply()
            ):
                if not self._aborts.confirm(message.call_id):
                    self._calls.resolve(message.call_id, (message, bulk))
            case _:  # a message without its case would be dropped, and its caller wait for a timeout
                assert_never(message)

    def _take_sign(self, next_s: float | None) -> None:
        if next_s and not self._next_s:
            return  # sent before it was asked, and no answer
        self._peer.heard(self.engine_id, self._loop.time(), next_s=next_s)

    def _take_heartbeat(self, message: wire.Heartbeat) -> None:
        if message.incarnation != self.info.incarnation:
            self.end(EngineLost(f"engine {self.engine_id} was replaced by a new life of it"))
            return
        self.load, self.load_at = message.load, self._loop.time()
        self._peer.progressed(
            self.engine_id, progress=message.load.progress, busy=message.load.is_busy, now=self._loop.time()
        )
        if message.load.draining:
            self._on_draining(self)


def _retrieve(future: asyncio.Future[Answer]) -> None:
    """A failure that nobody is left to see is not worth asyncio's complaint."""
    if not future.cancelled():
        future.exception()
