"""What the index says, as long as it says anything: who is a member, and which control state is in force.

Owns the DEALER to the index, the interval in which we say that we are here, and what makes a list of members
old. The index only *names* engines: its death, its restart with an empty list, or its silence is no news
about any of them. Knows neither engines' connections nor strategies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, assert_never

import msgspec
import structlog

from microserve.protocol import log
from microserve.protocol.bus.codec import INDEX_REPLY, INDEX_REQUEST
from microserve.protocol.bus.peers import SIGNS
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import ProtocolViolation
from microserve.protocol.messages import index, world
from microserve.protocol.messages.check import PairCheck, Suspect
from microserve.protocol.messages.engine import EngineInfo
from microserve.protocol.messages.host import HostFacts
from microserve.protocol.messages.strategy import control, decisions
from microserve.protocol.process.host import host_facts
from microserve.protocol.process.pace import Pace
from microserve.protocol.process.surviving import surviving
from microserve.protocol.process.tick import at_rest, between_signs
from microserve.protocol.settings.settings import BusSettings

_logger = structlog.get_logger()


class Watcher(Protocol):
    """Whom it tells."""

    def watch(self) -> index.Watch:
        """What the index is to hear of us now."""
        ...

    def take_members(self, infos: list[EngineInfo], *, is_first: bool) -> None:
        """``is_first``: of this life of the index, so that who is missing may only not be back yet."""
        ...

    def take_suspects(self, suspects: list[Suspect], routers: list[str], *, is_first: bool) -> None:
        """Between whom no KV goes, and who shares the checks (WIRE.md 6.8). ``is_first`` as above."""
        ...

    def checks(self) -> list[PairCheck]:
        """Those of :meth:`watch`, with their ages of now."""
        ...

    def take_control(self, state: control.ControlState) -> None:
        """It may be older than the one before; the index hears of us at once afterwards."""
        ...

    def answer(self, question: decisions.Question) -> decisions.Answer:
        """What there is to say of a request, if anything."""
        ...


class IndexWatch:
    """Keep :meth:`run` running; ``close`` it."""

    def __init__(
        self,
        bus: Bus,
        address: str,
        settings: BusSettings,
        watcher: Watcher,
        pace: Pace,
        *,
        host: Callable[[], HostFacts] = host_facts,
    ) -> None:
        """``host``: what there is to say of this process and machine, beside what is news."""
        self._address = address
        self._watcher = watcher
        self._interval_s = at_rest(settings.heartbeat_interval_s, settings.liveness)
        self._sign_interval_s = between_signs(settings.heartbeat_interval_s, settings.liveness)
        self._said: list[bytes] = []
        """Without what changes by itself."""
        self._said_at = float("-inf")
        self._pace = pace
        self._host = host
        self._is_paced = False
        """The index bears that we are silent for longer, so long as we say so."""
        self._next_s = 0.0
        """As we last said."""
        self._silence_s = settings.heartbeat_interval_s * settings.liveness
        self._loop = asyncio.get_running_loop()
        self._incarnation = 0
        self._version = -1
        self._heard_at: float | None = None
        self._stopping = False
        self._socket = bus.client(address, self._receive)

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            before_s, self._next_s = self._next_s, self._pace.next_s if self._is_paced else 0.0
            if before_s and not self._next_s and self._heard_at is not None:
                self._heard_at = self._loop.time()  # it need not have said anything so soon
            with surviving("watch of the index"):
                self._watch()
            await self._pace.tick(self._next_s, self._interval_s)
            silence_s = max(self._silence_s, SIGNS * self._next_s)
            if self._heard_at is not None and self._loop.time() - self._heard_at > silence_s:
                self._heard_at = None
                _logger.warning(log.INDEX_LOST, address=self._address)

    def stop(self) -> None:
        """Hand on nothing more; the socket stays until :meth:`close`."""
        self._stopping = True

    def close(self) -> None:
        self._stopping = True
        self._socket.close()

    def _watch(self) -> None:
        """What is new at once; else that we are here, with the last tick before it must be said."""
        watch = self._news()
        is_due = self._loop.time() - self._said_at >= self._sign_interval_s - self._interval_s
        if is_due or INDEX_REQUEST.encode(watch) != self._said:
            self._say(watch)

    def _news(self) -> index.Watch:
        return msgspec.structs.replace(self._watcher.watch(), next_s=self._next_s)

    def _say(self, watch: index.Watch) -> None:
        self._said, self._said_at = INDEX_REQUEST.encode(watch), self._loop.time()
        aged = msgspec.structs.replace(watch, host=self._host(), checks=self._watcher.checks())
        self._socket.send(INDEX_REQUEST.encode(aged))

    def _receive(self, frames: list[bytes]) -> None:
        try:
            message, _ = INDEX_REPLY.decode(frames)
        except ProtocolViolation as error:
            _logger.warning(log.FRAME_REJECTED, address=self._address, error=error.detail)
            return
        if self._stopping:
            return
        match message:
            case control.ControlState():
                self._watcher.take_control(message)
                self._say(self._news())  # whoever published waits for this
            case index.Members():
                self._take_members(message)
            case decisions.Question():
                with surviving("answer to a question"):
                    self._socket.send(INDEX_REQUEST.encode(self._watcher.answer(message)))
            case (
                index.Registered()
                | index.Unknown()
                | index.Matches()
                | index.IndexReport()
                | index.IndexFailed()
                | control.Changed()
                | control.ControlReport()
                | control.ControlRecords()
                | world.WorldJoined()
                | world.WorldWaiting()
                | decisions.Asked()
                | decisions.Explained()
            ):
                pass  # answers to calls, which this link does not make
            case _:  # a message without its case is an error of the type checker
                assert_never(message)

    def _take_members(self, members: index.Members) -> None:
        if self._heard_at is None:
            _logger.info(log.INDEX_JOINED, address=self._address, incarnation=members.index_incarnation)
        self._heard_at, self._is_paced = self._loop.time(), members.paced
        is_first = members.index_incarnation != self._incarnation
        if is_first:
            self._incarnation, self._version = members.index_incarnation, -1
        if members.version >= self._version:
            self._version = members.version
            self._watcher.take_members([member.info for member in members.members], is_first=is_first)
            self._watcher.take_suspects(members.suspects, members.routers, is_first=is_first)
