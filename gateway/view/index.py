"""What a gateway asks of the index for its view: who is a member, what is in force, why a request went there.

Owns one DEALER, the sign of life in every interval, and calls that are said again until they are answered or
their time is over. Changes nothing at the index, and applies nothing that it says.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import structlog

from microserve.gateway.view.mesh import Mesh
from microserve.protocol import log
from microserve.protocol.bus.codec import INDEX_REPLY, INDEX_REQUEST
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import DeadlineExceeded, ProtocolViolation, error_for
from microserve.protocol.messages.index import (
    IndexFailed,
    IndexReply,
    IndexReport,
    IndexRequest,
    IndexStats,
    Members,
    Watch,
)
from microserve.protocol.messages.strategy.control import (
    ControlHistory,
    ControlRecords,
    ControlReport,
    ControlStatus,
)
from microserve.protocol.messages.strategy.decisions import Asked, Explain, Explained
from microserve.protocol.process.surviving import surviving

REPORT_S = 5.0
"""Between two questions about engines that are missing, and about self-checks."""
CALL_S = 2.0
REPEAT_S = 0.5
ANSWERS_S = 0.5
"""Routers have so long to say what they remember; who is silent is named."""
MAX_CALLS = 64

_logger = structlog.get_logger()
T = TypeVar("T", bound=IndexReply)


class IndexLink:
    """Make it in the running loop; keep :meth:`run` running, and ``close`` it."""

    def __init__(
        self,
        bus: Bus,
        address: str,
        mesh: Mesh,
        *,
        gateway_id: str,
        interval_s: float,
        clock: Callable[[], float],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._watch = INDEX_REQUEST.encode(Watch(f"view of {gateway_id}"))
        self._mesh = mesh
        self._clock = clock
        self._wall_clock = wall_clock
        self._interval_s = interval_s
        self._address = address
        self._ids = itertools.count(1)
        self._calls: dict[int, asyncio.Future[IndexReply]] = {}
        self._told: dict[int, dict[str, Explained]] = {}
        self._all_told: dict[int, asyncio.Event] = {}
        self._socket = bus.client(address, self._receive)

    async def run(self) -> None:
        """Until cancelled. A silent index is no fault of this one: the mesh has the age of what it said."""
        asking = asyncio.create_task(self._ask_for_missing(), name="view of who is missing")
        try:
            while True:
                with surviving("view of the mesh"):
                    self._socket.send(self._watch)
                    self._mesh.history.tick(self._clock())
                await asyncio.sleep(self._interval_s)
        finally:
            asking.cancel()

    async def _ask_for_missing(self) -> None:
        while True:
            with surviving("view of who is missing"), suppress(DeadlineExceeded):
                report = await self.report()
                self._mesh.take_missing(report.missing)
                self._mesh.take_checks(report.checks, self._wall_clock())
            await asyncio.sleep(REPORT_S)

    def close(self) -> None:
        """What was asked is not waited for any more: an index that is away must not hold up the end."""
        self._socket.close(lingers=False)

    async def report(self) -> IndexReport:
        return await self._ask(IndexReport, IndexStats)

    async def status(self) -> ControlReport:
        found = await self._ask(ControlReport, ControlStatus)
        self._mesh.take_labels(found.state.labels)
        return found

    async def history(self, limit: int) -> ControlRecords:
        return await self._ask(ControlRecords, lambda call_id: ControlHistory(call_id, limit=limit))

    async def explain(
        self, request_id: str = "", *, scores_of: str | None = None
    ) -> tuple[list[Explained], list[str]]:
        """What every router says, and the names of those that say nothing in time."""
        call_id = next(self._ids)
        self._told[call_id], self._all_told[call_id] = {}, asyncio.Event()
        try:
            asked = await self._ask(Asked, lambda _: Explain(call_id, request_id, scores_of), call_id)
            told, changed = self._told[call_id], self._all_told[call_id]
            try:
                async with asyncio.timeout(ANSWERS_S):
                    while not told.keys() >= set(asked.routers):
                        changed.clear()
                        await changed.wait()
            except TimeoutError:
                pass
            silent = sorted({*asked.routers} - told.keys() | {*asked.silent})
            return list(told.values()), silent
        finally:
            del self._told[call_id], self._all_told[call_id]

    async def _ask(self, reply: type[T], make: Callable[[int], IndexRequest], call_id: int = 0) -> T:
        """Raises what the index says, and :class:`DeadlineExceeded` where it says nothing."""
        call_id = call_id or next(self._ids)
        if len(self._calls) >= MAX_CALLS:
            raise DeadlineExceeded("too many questions to the index at once; ask again", retry_after_s=1.0)
        waiting = self._calls[call_id] = asyncio.get_running_loop().create_future()
        frames = INDEX_REQUEST.encode(make(call_id))
        try:
            async with asyncio.timeout(CALL_S):
                while True:
                    self._socket.send(frames)
                    done, _ = await asyncio.wait([waiting], timeout=REPEAT_S)
                    if done:
                        break
        except TimeoutError:
            raise DeadlineExceeded(
                f"the index at {self._address} does not answer", retry_after_s=1.0
            ) from None
        finally:
            del self._calls[call_id]
        answer = waiting.result()
        if isinstance(answer, IndexFailed):
            raise error_for(answer.code, answer.detail, field=answer.field)
        if not isinstance(answer, reply):
            raise ProtocolViolation(f"the index answers {type(answer).__name__}, not {reply.__name__}")
        return answer

    def _receive(self, frames: list[bytes]) -> None:
        try:
            message, _ = INDEX_REPLY.decode(frames)
        except ProtocolViolation as error:
            _logger.warning(log.FRAME_REJECTED, address=self._address, error=error.detail)
            return
        if isinstance(message, Members):
            self._mesh.take_members(message, self._clock())
            return
        call_id = getattr(message, "call_id", None)
        if call_id is None:
            return  # of calls that this link does not make
        if isinstance(message, Explained):
            if call_id in self._told:
                self._told[call_id][message.router_id] = message
                self._all_told[call_id].set()
            return
        waiting = self._calls.get(call_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(message)
