"""Several generations of one request, of which the first that gives output goes on and the others end.

Owns who starts when and who wins. Output is taken from the winner alone, so each token is delivered once; the
losers' engines, and senders that worked for them alone, drop the request. Knows no choice of engines.

    start a ── after_s without output ── start b ── ... ── first output: the winner; the others are aborted
          └── a fails: b starts at once; when all have failed: the error of the last

Source: hedged requests, Dean and Barroso, "The Tail at Scale" (CACM 2013).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from microserve.protocol.errors import DeadlineExceeded, InvalidInterval, MeshError, StrategyError
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.numerics import Numerics
from microserve.services.links.engine import Answer
from microserve.services.router.authoring.action.engine import Engine
from microserve.services.router.authoring.action.generating import Generating
from microserve.services.router.request.request import Request
from microserve.services.router.request.scope import RequestScope

MAX_ENTRANTS = 8
Entrant = Engine | Callable[[], Generating]
"""An engine that computes all of the prompt, or what starts another generation (with a grant, say)."""


@dataclass(frozen=True, slots=True)
class _Runner:
    generation: Generating
    started_at: float
    numerics: Numerics
    begin: int
    awaits_first: bool


async def race(
    scope: RequestScope, request: Request, entrants: Sequence[Entrant], after_s: float
) -> Generating:
    """The winner, whose output is still to be read. Raises :class:`StrategyError` for what is no race, and
    what the last entrant failed with when all have; then the request may generate anew."""
    if not 0 < len(entrants) <= MAX_ENTRANTS:
        raise StrategyError(f"a race has 1 to {MAX_ENTRANTS} entrants, not {len(entrants)}")
    if not after_s >= 0.0:
        raise StrategyError(f"after_s is {after_s}, not 0 or more")
    if scope.is_generating:
        raise StrategyError("a request generates once")
    return await _Race(scope, request, list(dict.fromkeys(entrants)), after_s).run()


class _Race:
    def __init__(
        self, scope: RequestScope, request: Request, entrants: Sequence[Entrant], after_s: float
    ) -> None:
        self._scope = scope
        self._request = request
        self._waiting = deque(entrants)
        self._after_s = after_s
        self._running: list[_Runner] = []
        self._error: MeshError | None = None
        self._is_news = asyncio.Event()
        self._next_at = scope.now

    async def run(self) -> Generating:
        scope = self._scope
        try:
            with scope.engaged():
                while (winner := await self._look()) is None:
                    await self._wait()
        except BaseException:
            self._end(self._running)
            scope.is_generating = False
            raise
        losers = [runner for runner in self._running if runner is not winner]
        engine_id = winner.generation.engine_id
        self._end(losers, engine_id)
        decision = scope.decision
        decision.engine_id, decision.begin = engine_id, winner.begin
        decision.awaits_first = winner.awaits_first
        scope.numerics, scope.is_generating = winner.numerics, True
        scope.leave = winner.generation.leave
        return winner.generation

    async def _look(self) -> _Runner | None:
        """Who has won; else those that have failed are out, and who is due has started."""
        self._is_news.clear()
        for runner in list(self._running):
            is_ready = runner.generation.is_ready
            if is_ready:
                return runner
            if is_ready is None and self._is_late(runner):
                self._fail(runner, DeadlineExceeded(f"engine {runner.generation.engine_id} does not answer"))
            elif is_ready is not None:
                try:
                    await anext(runner.generation)
                except MeshError as error:
                    self._fail(runner, error)
        while self._waiting and (not self._running or self._scope.now >= self._next_at):
            self._start(self._waiting.popleft())
        if not self._running and not self._waiting:
            assert self._error is not None
            raise self._error
        return None

    def _is_late(self, runner: _Runner) -> bool:
        late_at = runner.started_at + self._scope.call_timeout_s
        return not runner.generation.is_answered and self._scope.now >= late_at

    def _fail(self, runner: _Runner, error: MeshError) -> None:
        self._error = error
        self._end([runner])
        self._running.remove(runner)
        self._next_at = self._scope.now

    def _start(self, entrant: Entrant) -> None:
        scope = self._scope
        scope.is_generating = False
        try:
            generation = entrant.start_generate(self._request) if isinstance(entrant, Engine) else entrant()
        except (StrategyError, InvalidInterval):
            raise
        except MeshError as error:
            self._error = error
            return
        if not isinstance(generation, Generating) or not generation.is_of(scope):
            raise StrategyError("an entrant of a race starts no generation of this request")
        decision = scope.decision
        runner = _Runner(generation, scope.now, scope.numerics, decision.begin, decision.awaits_first)
        others = [other.generation.engine_id for other in self._running]
        self._running.append(runner)
        if generation.engine_id in others:
            raise StrategyError(f"engine {generation.engine_id} races with itself")
        generation.watch(self._is_news.set)
        self._next_at = scope.now + self._after_s

    async def _wait(self) -> None:
        """Until something has changed, or is due."""
        scope = self._scope
        due = [self._next_at] if self._waiting else []
        due += [
            runner.started_at + scope.call_timeout_s
            for runner in self._running
            if not runner.generation.is_answered
        ]
        with suppress(TimeoutError):
            async with asyncio.timeout_at(min(due, default=None)):
                await self._is_news.wait()

    def _end(self, losers: Sequence[_Runner], winner: str = "") -> None:
        """Who has lost does nothing more for this request, nor do those that sent to it alone. All that a
        winner builds on is in: it has output. Others still need their senders, which may run here as well."""
        scope = self._scope
        lost = {runner.generation.engine_id for runner in losers} - {winner}
        if winner:
            self._let_go(winner)
            lost |= {engine_id for engine_id in scope.unused.values()}
        kept = [send for send in scope.decision.sends if send.target not in lost]
        senders = {send.source for send in scope.decision.sends if send.target in lost}
        needed = {winner, *(runner.generation.engine_id for runner in self._running if runner not in losers)}
        if not winner:
            needed |= {send.source for send in kept}
        for runner in losers:
            runner.generation.give_up(StrategyError("another engine was faster"))
        scope.abort_engines((lost | senders) - needed)
        scope.decision.sends = kept

    def _let_go(self, winner: str) -> None:
        """Grants on the winner's engine, of entrants that never started: nobody will use them."""
        scope, request_id = self._scope, self._request.request_id
        for grant_id in [grant_id for grant_id, engine_id in scope.unused.items() if engine_id == winner]:
            for connection in scope.holders_of(grant_id):
                build = partial(wire.Release, request_id=request_id, grant_id=grant_id)
                with suppress(MeshError):  # a lost engine holds nothing
                    _, answer = connection.begin(build)
                    answer.add_done_callback(_ignore)
                scope.drop(connection, grant_id)
            scope.use(grant_id)


def _ignore(answer: asyncio.Future[Answer]) -> None:
    """Whether it was there to be released is nobody's business."""
    if not answer.cancelled():
        answer.exception()
