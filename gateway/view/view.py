"""What one gateway process has for who looks: its requests, the index's word of the mesh, and who is told of
changes.

Owns how the workers of one gateway answer together: each tells its siblings what it keeps. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import msgspec

from microserve.gateway.view.feed import MAX_ENDED, MAX_RUNNING, Feed, Look
from microserve.gateway.view.forms import HealthForm, RequestForm, RequestsForm
from microserve.gateway.view.index import IndexLink
from microserve.gateway.view.mesh import Mesh
from microserve.gateway.view.query import Query
from microserve.gateway.view.requests import Requests, is_called

ASKED_REQUESTS, ASKED_SINCE, ASKED_ONE = "requests", "since", "one"


class Running(Protocol):
    """A request that is being served."""

    def forms(self, now: float) -> list[RequestForm]:
        """Of each choice; ``now`` as of the view's clock."""
        ...


class Part(msgspec.Struct, frozen=True):
    """What one process tells."""

    num_added: int
    """Requests that have ended there since its start."""
    num_kept: int
    ended: list[RequestForm]
    running: list[RequestForm]
    num_running: int


AskSiblings = Callable[[str, bytes], Awaitable[Mapping[int, bytes]]]
"""What the other workers answer, by number; who is silent is left out."""

_encode = msgspec.msgpack.encode
_part = msgspec.msgpack.Decoder(Part)
_query = msgspec.msgpack.Decoder(Query)


async def _no_siblings(what: str, argument: bytes) -> Mapping[int, bytes]:
    return {}


class View:
    def __init__(
        self,
        requests: Requests,
        mesh: Mesh,
        feed: Feed,
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        number: int = 0,
    ) -> None:
        """``clock``: monotonic, that of the requests' timelines; ``number``: of this worker."""
        self.requests, self.mesh, self.feed = requests, mesh, feed
        self.clock, self.wall_clock = clock, wall_clock
        self.link: IndexLink | None = None
        """None: nothing is known of the mesh beside this gateway's own."""
        self.control_version = 0
        self.num_readers = 0
        """Of the feed."""
        self.ask_siblings: AskSiblings = _no_siblings
        self._number = number
        self._running: dict[int, Running] = {}
        self._looking = asyncio.Lock()
        self._looked_at = float("-inf")
        self._seen: dict[int, int] = {}
        """Requests that have been taken into the feed, by worker."""

    # --- what happens --------------------------------------------------------------------------------

    def began(self, request: Running) -> None:
        self._running[id(request)] = request

    def over(self, request: Running) -> None:
        self._running.pop(id(request), None)

    # --- what one process tells its siblings ---------------------------------------------------------

    async def answer(self, what: str, argument: bytes) -> bytes:
        """To a sibling; empty for what is not known here."""
        now = self.clock()
        if what == ASKED_REQUESTS:
            query = _query.decode(argument)
            return _encode(self._part(await self._chosen(query, now), query.limit, now))
        if what == ASKED_SINCE:
            num_seen = msgspec.msgpack.decode(argument, type=int)
            return _encode(self._part(self._since(num_seen, now), MAX_RUNNING, now))
        if what == ASKED_ONE:
            return _encode(self._find(msgspec.msgpack.decode(argument, type=str), now))
        return b""

    async def _chosen(self, query: Query, now: float) -> list[RequestForm]:
        """In a thread: tokens go on meanwhile, however many are kept."""
        return await asyncio.to_thread(query.first, self.requests.kept_now(), now)

    def _since(self, num_seen: int, now: float) -> list[RequestForm]:
        # Another life of this worker counts anew.
        since = num_seen if num_seen <= self.requests.num_added else 0
        return self.requests.since(since, now)[-MAX_ENDED:]

    def _part(self, ended: list[RequestForm], limit: int, now: float) -> Part:
        self.requests.expire(now)
        running: list[RequestForm] = []
        for request in self._running.values():
            if len(running) >= limit:
                break
            running += request.forms(now)
        return Part(self.requests.num_added, len(self.requests), ended, running[:limit], len(self._running))

    def _find(self, wanted: str, now: float) -> RequestForm | None:
        for request in self._running.values():
            for form in request.forms(now):
                if is_called(form, wanted):
                    return form
        return self.requests.find(wanted, now)

    # --- what all of them know -----------------------------------------------------------------------

    async def ended(self, query: Query) -> RequestsForm:
        now = self.clock()
        own = self._part(await self._chosen(query, now), query.limit, now)
        told = await self.ask_siblings(ASKED_REQUESTS, _encode(query))
        parts = [own, *(_part.decode(each) for each in told.values() if each)]
        return RequestsForm(
            at=self.wall_clock(),
            running=sorted((form for part in parts for form in part.running), key=lambda form: -form.age_s),
            ended=query.sorted(form for part in parts for form in part.ended),
            num_kept=sum(part.num_kept for part in parts),
        )

    async def find(self, wanted: str) -> RequestForm | None:
        """Of whichever worker remembers it."""
        found = self._find(wanted, self.clock())
        if found is not None:
            return found
        told = await self.ask_siblings(ASKED_ONE, _encode(wanted))
        forms = (msgspec.msgpack.decode(each, type=RequestForm | None) for each in told.values() if each)
        return next((form for form in forms if form is not None), None)

    async def look_at_most_every(self, interval_s: float, health: Callable[[], HealthForm]) -> None:
        """As :meth:`look`, once for all who ask within the interval."""
        async with self._looking:
            if self.clock() - self._looked_at >= interval_s or self.feed.num_ended is None:
                await self.look(health)
                self._looked_at = self.clock()

    async def look(self, health: Callable[[], HealthForm]) -> None:
        """Make the feed's next delta of everything that is new."""
        now = self.clock()
        own = self._part(self._since(self._seen.get(self._number, 0), now), MAX_RUNNING, now)
        least = min(self._seen.values(), default=0)
        told = await self.ask_siblings(ASKED_SINCE, _encode(least))
        parts = {self._number: own} | {each: _part.decode(data) for each, data in told.items() if data}
        ended: list[RequestForm] = []
        for number, part in parts.items():
            seen = self._seen.get(number, 0)
            num_new = part.num_added - seen if part.num_added >= seen else part.num_added
            ended += part.ended[-num_new:] if num_new else []
            self._seen[number] = part.num_added
        ended.sort(key=lambda form: -form.age_s)
        self.feed.look(
            Look(
                at=self.wall_clock(),
                index_alive=self.link is not None and self.mesh.is_index_alive(now),
                control_version=self.control_version,
                engines=self.mesh.engines(),
                running=[form for part in parts.values() for form in part.running][:MAX_RUNNING],
                num_running=sum(part.num_running for part in parts.values()),
                num_ended=sum(self._seen.values()),
                health=health(),
            ),
            ended,
        )
