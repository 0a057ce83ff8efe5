"""A peer of the index that publishes strategies, labels engines and sees who runs what (WIRE.md 6.4).

Owns one DEALER, its calls and their repetition: a call is idempotent, so it is said again until it is
answered or its time is over. Knows no command line and runs no source.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from microserve.protocol.bus.codec import INDEX_REPLY, INDEX_REQUEST
from microserve.protocol.bus.open import open_bus
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import DeadlineExceeded, MeshError, ProtocolViolation, error_for
from microserve.protocol.messages.engine import EngineInfo
from microserve.protocol.messages.index import IndexFailed, IndexReply, IndexRequest, Members, Watch
from microserve.protocol.messages.strategy.control import (
    KINDS,
    RAMP,
    ROLLBACK,
    Change,
    Changed,
    ControlHistory,
    ControlRecord,
    ControlRecords,
    ControlReport,
    ControlStatus,
    RouterControl,
    Scalar,
)
from microserve.protocol.messages.strategy.decisions import Asked, Explain, Explained
from microserve.protocol.messages.strategy.scores import Ramp
from microserve.protocol.security.rights import Role
from microserve.protocol.settings.settings import Settings

REPEAT_S = 0.5
LOOK_S = 0.01
"""Between two looks at who has applied a change."""

T = TypeVar("T", bound=IndexReply)


@dataclass(frozen=True, slots=True)
class Applied:
    """How a change fared."""

    version: int
    routers: list[RouterControl]
    late: list[str]
    """Routers that have not applied it within the time."""
    undone: str
    """Why it was taken back, or does not run; empty if it does."""
    seconds: float
    """From the change's sending to the last acknowledgement seen, or to giving up."""


class ControlClient:
    """Calls to one index. Make it in a running loop; ``close`` it."""

    def __init__(self, bus: Bus, address: str, *, timeout_s: float = 5.0) -> None:
        """``timeout_s`` bounds each call."""
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[IndexReply]] = {}
        self._members: asyncio.Future[Members] | None = None
        self._said: dict[int, dict[str, Explained]] = {}
        """By call, of those that several answer, and router."""
        self._has_said = asyncio.Event()
        self._address = address
        self._bus = bus
        self._socket = bus.client(address, self._receive)

    def close(self) -> None:
        self._socket.close()

    async def change(
        self,
        kind: str,
        strategy: str = "",
        *,
        source: str = "",
        parameters: dict[str, Scalar] | None = None,
        share: float = 1.0,
        reason: str = "",
        shadow: bool = False,
        max_ttft_s: float = 0.0,
        max_tpot_s: float = 0.0,
        engine: str = "",
        labels: Sequence[str] = (),
        sticky_by: str = "",
        ramp: Ramp | None = None,
    ) -> int:
        """The version of the change, once it is logged. Raises the :class:`MeshError` that the index says,
        and :class:`DeadlineExceeded` when it says nothing: then the history tells whether it was logged."""
        if kind not in KINDS:
            raise ValueError(kind)
        change_id = secrets.token_hex(8)
        reply = await self._ask(
            Changed,
            lambda call_id: Change(
                call_id,
                change_id,
                kind,
                strategy,
                source,
                parameters or {},
                share,
                shadow=shadow,
                reason=reason,
                max_ttft_s=max_ttft_s,
                max_tpot_s=max_tpot_s,
                engine=engine,
                labels=list(labels),
                sticky_by=sticky_by,
                ramp=ramp,
            ),
        )
        return reply.version

    async def report(self) -> ControlReport:
        return await self._ask(ControlReport, ControlStatus)

    async def history(self, strategy: str = "", limit: int = 100) -> list[ControlRecord]:
        """The newest first."""
        reply = await self._ask(ControlRecords, lambda call_id: ControlHistory(call_id, strategy, limit))
        return reply.records

    async def labels(self) -> list[list[str]]:
        """Of each engine of the mesh, as routers see them."""
        chosen = {each.engine: each.labels for each in (await self.report()).state.labels}
        return [chosen.get(info.engine_id, info.labels) for info in await self.engines()]

    async def engines(self) -> list[EngineInfo]:
        """The members, by id."""
        self._members = self._loop.create_future()
        self._socket.send(INDEX_REQUEST.encode(Watch(f"publisher-{secrets.token_hex(4)}")))
        try:
            async with asyncio.timeout(self._timeout_s):
                members = await self._members
        except TimeoutError:
            raise self._silence() from None
        return [member.info for member in members.members]

    async def applied(self, version: int, strategy: str, within_s: float) -> Applied:
        """Wait until every watching router has applied ``version``, it was taken back, or time is over.

        ``strategy`` empty: the change was of none, and nobody takes it back by himself.
        """
        began = self._loop.time()
        while True:
            report = await self.report()
            seconds = self._loop.time() - began
            undone = await self._undone(report, version, strategy)
            late = [router.router_id for router in report.routers if router.version < version]
            faults = [
                f for r in report.routers for f in r.faults if (f.strategy, f.version) == (strategy, version)
            ]
            if seconds > within_s and faults and not undone:
                undone = faults[0].reason
            if undone or seconds > within_s or not (late or faults):
                return Applied(version, report.routers, late, undone, seconds)
            await asyncio.sleep(LOOK_S)

    async def _undone(self, report: ControlReport, version: int, strategy: str) -> str:
        """The rollback, by a router or a ramp, of what is not in force any more."""
        if not strategy:
            return ""
        present = [
            each for entry in report.state.entries for each in (entry.stable, entry.canary, entry.shadow)
        ]
        if report.state.version <= version or any(each and each.version == version for each in present):
            return ""
        for record in await self.history(strategy, 16):
            by_itself = record.who.startswith("router ") or record.who == RAMP
            if record.version > version and record.kind == ROLLBACK and by_itself:
                return f"{record.who}: {record.reason}"
        return ""

    async def scores(self, strategy: str = "") -> tuple[Asked, list[Explained]]:
        """As :meth:`explain`, of how a strategy fares, or all of them."""
        return await self.explain("", scores_of=strategy)

    async def explain(
        self, request_id: str, *, scores_of: str | None = None
    ) -> tuple[Asked, list[Explained]]:
        """Who was asked what became of a request, and what they have answered, within the time of a call."""
        call_id = next(self._ids)
        said = self._said[call_id] = {}
        try:
            asked = await self._ask(Asked, lambda _: Explain(call_id, request_id, scores_of), call_id)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._timeout_s):
                    while not said.keys() >= set(asked.routers):
                        self._has_said.clear()
                        await self._has_said.wait()
        finally:
            del self._said[call_id]
        return asked, [said[router_id] for router_id in sorted(said)]

    # --- calls -------------------------------------------------------------------------------------

    async def _ask(self, kind: type[T], make: Callable[[int], IndexRequest], call_id: int | None = None) -> T:
        call_id = next(self._ids) if call_id is None else call_id
        future = self._waiting[call_id] = self._loop.create_future()
        frames = INDEX_REQUEST.encode(make(call_id))
        deadline = self._loop.time() + self._timeout_s
        try:
            while not future.done():
                left_s = deadline - self._loop.time()
                if left_s <= 0:
                    raise self._silence()
                self._socket.send(frames)
                await asyncio.wait([future], timeout=min(left_s, REPEAT_S))
            reply = future.result()
        finally:
            del self._waiting[call_id]
        if isinstance(reply, IndexFailed):
            raise error_for(reply.code, reply.detail, field=reply.field)
        if not isinstance(reply, kind):
            raise ProtocolViolation(f"the index answered {type(reply).__name__}, not {kind.__name__}")
        return reply

    def _silence(self) -> MeshError:
        return DeadlineExceeded(silence_of_index(self._bus, self._address))

    def _receive(self, frames: list[bytes]) -> None:
        try:
            message, _ = INDEX_REPLY.decode(frames)
        except ProtocolViolation:
            return  # what answers there is no index: the call ends by its timeout
        if isinstance(message, Members):
            if self._members is not None and not self._members.done():
                self._members.set_result(message)
            return
        if isinstance(message, Explained):
            if message.call_id in self._said:
                self._said[message.call_id][message.router_id] = message
                self._has_said.set()
            return
        future = self._waiting.get(getattr(message, "call_id", 0))
        if future is not None and not future.done():
            future.set_result(message)


def silence_of_index(bus: Bus, address: str) -> str:
    """What there is to say of an index that does not answer. One that refuses a key is silent too."""
    silence = f"the index at {address} does not answer"
    if not bus.public_key:
        return silence
    return f"{silence}: it is away, our public key is not in its trusted/, or our index.key is not its key"


@asynccontextmanager
async def control_client(settings: Settings, timeout_s: float = 5.0) -> AsyncIterator[ControlClient]:
    """To the index of these settings. Raises :class:`ConfigError` for wrong keys."""
    bus = open_bus(settings, Role.OPERATOR)
    try:
        client = ControlClient(bus, settings.index.address, timeout_s=timeout_s)
        try:
            yield client
        finally:
            client.close()
    finally:
        bus.close()
