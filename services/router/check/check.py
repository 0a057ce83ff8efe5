"""The task that checks, one pair at a time, for as long as the router lives.

Owns when: every ``router.check_interval_s`` in the mesh, whatever the number of routers, and only while two
engines have nothing waiting; and that nothing waits for it: it is over in seconds, at once when an engine of
the pair drains, and with the router. A check that cannot be brought to its end says nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import structlog

from microserve.protocol import log
from microserve.protocol.errors import DeadlineExceeded, InvalidRequest, MeshError
from microserve.protocol.messages.check import (
    BITS,
    CACHED,
    DIFFERS,
    EQUAL,
    TOKENS,
    TRANSFERRED,
    UNFINISHED,
    PairCheck,
    Suspect,
)
from microserve.protocol.process.surviving import surviving
from microserve.services.links.engine import EngineConnection, RouterIdentity
from microserve.services.router.check.book import CheckBook
from microserve.services.router.check.question import (
    ask,
    ask_across,
    draw_question,
    num_blocks_of,
)
from microserve.services.router.check.rota import Pair, Rota
from microserve.services.router.check.verdict import Answer, first_difference
from microserve.services.router.engines.load import LoadBook
from microserve.services.router.engines.registry import Registry
from microserve.services.router.engines.suspects import Suspects
from microserve.services.router.request.phase import PhaseClock
from microserve.services.router.request.request import Request
from microserve.services.router.request.scope import RequestScope

FIRST_S = 5.0
"""The first check comes after so long at the latest: who starts a mesh wants to know."""
DEADLINE_S = 10.0
"""Of all three answers together."""
FREE_SHARE = 1 / 16
"""Of an engine's blocks must be free."""

_logger = structlog.get_logger()


class SelfCheck:
    """Keep :meth:`run` running."""

    def __init__(
        self,
        interval_s: float,
        identity: RouterIdentity,
        registry: Registry,
        book: LoadBook,
        *,
        call_timeout_s: float,
        has_room: Callable[[], bool],
        on_news: Callable[[], None],
    ) -> None:
        """``interval_s`` 0: none is made here; what others find counts all the same. ``has_room``: no request
        waits in this router. ``on_news`` is called after every check."""
        self.book = CheckBook()
        self.suspects = Suspects()
        self._interval_s = interval_s
        self._identity = identity
        self._registry = registry
        self._load_book = book
        self._call_timeout_s = call_timeout_s
        self._has_room = has_room
        self._on_news = on_news
        self._rng = random.Random(identity.incarnation)
        self._rota = Rota()
        self._routers: list[str] = []
        self._number = self._rng.getrandbits(31)
        """Another life of this router goes on elsewhere."""
        self._loop = asyncio.get_running_loop()
        self._pair: list[EngineConnection] = []
        self._limit: asyncio.Timeout | None = None
        """Of the check that runs."""

    # --- what is told --------------------------------------------------------------------------------

    def take(self, suspects: list[Suspect], routers: list[str], *, is_first: bool) -> None:
        """The index says who exchanges no KV, and which routers there are."""
        self._routers = routers
        before = self.suspects.pairs
        self.suspects.take(suspects, self._loop.time(), is_first=is_first, knows=bool(routers))
        if self.suspects.pairs != before:
            self._registry.bar(self.suspects)

    def look(self) -> None:
        """Call when an engine drains or leaves: no check keeps it."""
        if self._limit is not None and any(each.is_leaving or each.load.draining for each in self._pair):
            self._limit.reschedule(self._loop.time())

    def told(self) -> list[PairCheck]:
        """What there is to say to the index, with the ages of now."""
        return self.book.told(self._loop.time())

    @property
    def age_s(self) -> float | None:
        """Since the last one that was brought to its end; None before that."""
        at = self.book.passed_at
        return None if at is None else self._loop.time() - at

    # --- what is done --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled."""
        if not self._interval_s:
            return
        pause_s = min(self._interval_s, FIRST_S)
        while True:
            await asyncio.sleep(pause_s * self._rng.uniform(0.75, 1.0))  # routers are not to meet
            with surviving("self-check"):
                await self._turn()
            pause_s = self._interval_s * max(1, len(self._routers))

    async def _turn(self) -> None:
        usable = {each.engine_id: each for each in self._registry.usable()}
        self.book.keep(set(usable))
        barred = self.suspects.pairs
        pair = self._rota.next(
            [each.info for each in usable.values()],
            self._routers,
            self._identity.router_id,
            is_free=lambda engine_id: self._has_room() and _is_free(usable[engine_id]),
            is_barred=lambda pair: pair in barred or (pair[0], "") in barred,
        )
        if pair is None:
            self.book.num_skipped += bool(usable)
            return
        check = await self._check(pair, *(usable[each] for each in pair if each))
        now = self._loop.time()
        self.book.add(check, now)
        new, back = self.suspects.found(check, now)
        if new or back:
            self._registry.bar(self.suspects)
            _tell(check, bool(new))
        self._on_news()

    async def _check(
        self, pair: Pair, source: EngineConnection, target: EngineConnection | None = None
    ) -> PairCheck:
        self._number += 1
        began = self._loop.time()
        compared = BITS if source.info.numerics.is_exact else TOKENS
        answers: list[Answer] = []
        differs = code = ""
        self._pair = [source] if target is None else [source, target]
        try:
            async with asyncio.timeout_at(began + DEADLINE_S) as self._limit:
                differs = await self._differing(source, target, compared, answers)
        except TimeoutError:
            code = DeadlineExceeded.code
        except MeshError as error:
            code = error.code
        finally:
            self._pair, self._limit = [], None
        outcome = UNFINISHED if code else DIFFERS if differs else EQUAL
        took_s, num_tokens = self._loop.time() - began, sum(each.num_computed for each in answers)
        return PairCheck(*pair, outcome, differs, compared, code, self._number, took_s, num_tokens)

    async def _differing(
        self,
        source: EngineConnection,
        target: EngineConnection | None,
        compared: str,
        answers: list[Answer],
    ) -> str:
        """Which answer is not as the cold one; empty: they are equal."""
        name = f"check-{self._identity.incarnation:x}-{self._number:x}"
        question = draw_question(name, source.info, self._loop.time() + DEADLINE_S, self._rng)
        if question is None:
            raise InvalidRequest("the model's context is too short for a check")
        answers.append(await ask(source, question, "cold", self._scope))
        answers.append(await ask(source, question, CACHED, self._scope))
        if first_difference(answers[0], answers[1], compared) is not None:
            return CACHED
        if target is None:
            return ""
        answers.append(await ask_across(source, target, question, TRANSFERRED, self._scope))
        return "" if first_difference(answers[0], answers[2], compared) is None else TRANSFERRED

    def _scope(self, request: Request) -> RequestScope:
        """In the book like any other request: strategies see that somebody is there."""
        clock = PhaseClock(self._loop.time())
        return RequestScope(request, self._load_book.open(), clock, call_timeout_s=self._call_timeout_s)


def _is_free(connection: EngineConnection) -> bool:
    """It has nothing waiting, and room for the question."""
    info, load = connection.info, connection.load
    if load.num_waiting or (load.max_num_seqs and load.num_running >= load.max_num_seqs):
        return False
    return load.free_blocks >= max(num_blocks_of(info), FREE_SHARE * info.num_blocks) or not info.num_blocks


def _tell(check: PairCheck, is_new: bool) -> None:
    tell = _logger.error if is_new else _logger.info
    tell(
        log.CHECK_DIFFERS if is_new else log.CHECK_PASSED,
        source=check.source,
        target=check.target,
        differs=check.differs,
        compared=check.compared,
        took_s=round(check.took_s, 6),
    )
