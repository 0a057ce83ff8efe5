"""Looks at a mesh: every address, what index, gateways and each engine say, and what engines do when asked.

Owns the bus of a doctor, and what it asks in which order. Judges nothing (judging.py).
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import TypeVar

from microserve.protocol.bus.codec import INDEX_REPLY, INDEX_REQUEST
from microserve.protocol.bus.curve import CurveKeys
from microserve.protocol.bus.open import load_keys, open_bus
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import EngineLost, MeshError, ProtocolViolation
from microserve.protocol.messages.engine import EngineInfo, EngineStats, Stats
from microserve.protocol.messages.host import HostFacts
from microserve.protocol.messages.index import (
    IndexReply,
    IndexReport,
    IndexRequest,
    IndexStats,
    Member,
    Members,
    Watch,
)
from microserve.protocol.messages.strategy.control import ControlReport, ControlStatus, RouterControl
from microserve.protocol.process.host import host_facts
from microserve.protocol.security.rights import Role
from microserve.protocol.settings.settings import Settings
from microserve.services.command.doctor.gateways import ask_gateway, urls_from_here
from microserve.services.command.doctor.judging_engines import is_usable
from microserve.services.command.doctor.observation import (
    EngineSeen,
    GatewaySeen,
    HostSeen,
    LinkSeen,
    Observation,
    Place,
    Reach,
    RouterSeen,
)
from microserve.services.command.doctor.reach import try_place
from microserve.services.command.doctor.trying import can_send, measure_link, try_cache
from microserve.services.links.engine import EngineConnection, RouterIdentity

REACH_S = 5.0
"""Longer than a server takes to give up a handshake (3 s)."""
CALL_S = 5.0
MAX_LINKS = 32
"""Pairs of engines that are tried; of more, each with its neighbours in order."""

Tell = Callable[[str], None]
T = TypeVar("T", bound=IndexReply)


async def look(settings: Settings, *, tries: bool, tell: Tell, gateways: Sequence[str] = ()) -> Observation:
    """``tries``: let engines send and answer. ``gateways``: URLs, beside those that routers know. Raises
    :class:`ConfigError` for keys of no use."""
    keys = load_keys(settings, Role.OPERATOR)
    own = HostSeen("this host, doctor", host_facts())
    tell(f"index at {settings.index.address}")
    place = await _reach("index", settings.index.address, keys, "")
    seen = Observation(place, has_keys=keys is not None, version=version("microserve"), own=own, tried=tries)
    if place.reach is not Reach.REACHED:
        return replace(seen, gateways=await _gateways([], gateways, settings))
    bus = open_bus(settings, Role.OPERATOR)
    try:
        return await _Look(settings, bus, keys, tell).run(seen, gateways)
    finally:
        bus.close()


async def _reach(what: str, address: str, keys: CurveKeys | None, server_key: str) -> Place:
    return await asyncio.to_thread(try_place, what, address, keys, server_key, REACH_S)


async def _gateways(told: Sequence[str], asked: Sequence[str], settings: Settings) -> list[GatewaySeen]:
    urls = urls_from_here(told, asked, settings.index.address)
    return [*await asyncio.gather(*(ask_gateway(url, settings.gateway.tls_cert) for url in urls))]


class _Look:
    def __init__(self, settings: Settings, bus: Bus, keys: CurveKeys | None, tell: Tell) -> None:
        self._settings, self._bus, self._keys, self._tell = settings, bus, keys, tell
        self._identity = RouterIdentity(f"doctor-{secrets.token_hex(4)}", secrets.randbits(62) | 1)
        self._connections: dict[str, EngineConnection] = {}
        self._keeping: list[asyncio.Task[MeshError]] = []

    async def run(self, seen: Observation, asked: Sequence[str]) -> Observation:
        with_index = await self._ask_index(seen)
        if isinstance(with_index, str):
            place = Place("index", seen.index.address, detail=with_index)
            return replace(seen, index=place, gateways=await _gateways([], asked, self._settings))
        members, report, known, host = with_index
        self._tell("gateways")
        told = [url for router in known for url in router.gateways]
        gateways = await _gateways(told, asked, self._settings)
        try:
            engines = [*await asyncio.gather(*map(self._look_at, members))]
            usable = [self._connections[e.info.engine_id] for e in engines if self._is_usable(e)]
            pairs = [(a, b) for a in usable for b in usable if can_send(a, b)]
            tried = _some(pairs, usable) if seen.tried else []
            links = []
            for source, target in tried:
                self._tell(f"KV from {source.engine_id} to {target.engine_id}")
                links.append(await measure_link(source, target))
            cache = None
            if seen.tried and usable:
                self._tell("answers: cold, cached, transferred")
                sends = [pair for pair in tried if not _has_failed(links, pair)]
                cache = await (try_cache(*sends[0]) if sends else try_cache(usable[0], None))
        finally:
            for task in self._keeping:
                task.cancel()
            for connection in self._connections.values():
                connection.end(EngineLost("the doctor has seen enough"))
        return replace(
            seen,
            index_host=host,
            report=report,
            engines=engines,
            routers=[_router(router, host) for router in known],
            gateways=gateways,
            links=links,
            num_pairs=len(pairs),
            cache=cache,
        )

    # --- the index ---------------------------------------------------------------------------------

    async def _ask_index(
        self, seen: Observation
    ) -> tuple[list[Member], IndexReport, list[RouterControl], HostSeen] | str:
        """Or why it cannot be had."""
        answers: asyncio.Queue[IndexReply] = asyncio.Queue()

        def take(frames: list[bytes]) -> None:
            try:
                answers.put_nowait(INDEX_REPLY.decode(frames)[0])
            except ProtocolViolation:
                return  # what answers there is no index: it stays without an answer

        socket = self._bus.client(seen.index.address, take)

        async def ask(request: IndexRequest, expected: type[T]) -> T:
            socket.send(INDEX_REQUEST.encode(request))
            while not isinstance(answer := await answers.get(), expected):
                pass
            return answer

        try:
            async with asyncio.timeout(CALL_S):
                members = await ask(Watch(self._identity.router_id), Members)
                began = time.time()
                report = await ask(IndexStats(1), IndexReport)
                host = _host("the index's host", report.host, began, time.time())
                control = await ask(ControlStatus(2), ControlReport)
        except TimeoutError:
            return "it lets us in and does not answer"
        finally:
            socket.close()
        return members.members, report, control.routers, host

    # --- one engine --------------------------------------------------------------------------------

    async def _look_at(self, member: Member) -> EngineSeen:
        info = member.info
        self._tell(f"engine {info.engine_id}")
        asked = [
            ("actions", info.address, info.curve_key),
            ("events", info.events_address, info.events_key),
            ("replay", info.replay_address, info.events_key),
        ]
        places = [
            *await asyncio.gather(*(_reach(what, at, self._keys, key) for what, at, key in asked if at))
        ]
        seen = EngineSeen(info, member.load, places)
        if info.only_publishes or places[0].reach is not Reach.REACHED:
            return seen
        try:
            host = await self._join(info)
        except MeshError as error:
            return EngineSeen(info, member.load, places, error=error.detail)
        return EngineSeen(info, self._connections[info.engine_id].load, places, host)

    async def _join(self, info: EngineInfo) -> HostSeen:
        connection = EngineConnection(
            self._bus, info, self._identity, self._settings.bus, call_timeout_s=CALL_S
        )
        self._connections[info.engine_id] = connection
        await connection.join()
        self._keeping.append(asyncio.create_task(connection.run()))
        began = time.time()
        stats = await connection.call(partial(Stats), EngineStats, timeout_s=CALL_S)
        return _host(f"engine {info.engine_id}", stats.host, began, time.time())

    def _is_usable(self, engine: EngineSeen) -> bool:
        connection = self._connections.get(engine.info.engine_id)
        return connection is not None and connection.is_joined and is_usable(engine)


def _host(who: str, facts: HostFacts, began: float, ended: float) -> HostSeen:
    if not facts.wall_s:
        return HostSeen(who, facts)
    return HostSeen(who, facts, facts.wall_s - (began + ended) / 2, (ended - began) / 2)


def _router(known: RouterControl, index: HostSeen) -> RouterSeen:
    """The index compares its clock with a router's, and we ours with the index's."""
    host = None
    if known.host.wall_s:
        who = f"router {known.router_id}"
        off_s = None if index.clock_off_s is None else index.clock_off_s + known.clock_off_s
        host = HostSeen(who, known.host, off_s, index.uncertain_s)
    return RouterSeen(known.router_id, known.software, host)


Pair = tuple[EngineConnection, EngineConnection]


def _some(pairs: list[Pair], usable: Sequence[EngineConnection]) -> list[Pair]:
    """All of them, or in a large mesh those of neighbours, both ways round."""
    if len(pairs) <= MAX_LINKS:
        return pairs
    near = {frozenset((a.engine_id, b.engine_id)) for a, b in itertools.pairwise([*usable, usable[0]])}
    return [(a, b) for a, b in pairs if frozenset((a.engine_id, b.engine_id)) in near][: 2 * MAX_LINKS]


def _has_failed(links: Sequence[LinkSeen], pair: Pair) -> bool:
    names = (pair[0].engine_id, pair[1].engine_id)
    return any((link.source, link.target) == names and link.error for link in links)
