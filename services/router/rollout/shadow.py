"""Shadow versions: they decide about live requests that others serve, and are scored beside what was done.

    request admitted ──> shadow decides at once, by engines that answer and do nothing (shadow_engine.py)
                    └──> served as ever; its own decision is in its scope
    both are there   ──> both are priced with what was known at the admission (decision.py), and counted

A shadow costs the router its decision and no engine anything. Its mistakes are counted; too many of them, or
one that hangs, and the version is reported as a fault. Knows no gateways and sends nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import structlog

from microserve.protocol import log
from microserve.protocol.errors import StrategyError
from microserve.protocol.process.surviving import survive
from microserve.services.router.authoring.definition import Strategy
from microserve.services.router.authoring.driver import Driver
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.authoring.plan import PlanMesh, Plans, borrowed
from microserve.services.router.authoring.view import StrategyState
from microserve.services.router.engines.connection import Connection
from microserve.services.router.engines.load import LoadBook
from microserve.services.router.engines.prediction import EngineView, engine_view
from microserve.services.router.engines.prefix import Lookup
from microserve.services.router.engines.registry import Registry
from microserve.services.router.oversight.author import nobodys
from microserve.services.router.request.decision import Decision
from microserve.services.router.request.phase import PhaseClock
from microserve.services.router.request.request import Request, fits
from microserve.services.router.request.scope import RequestScope
from microserve.services.router.rollout.score import Cost, cost_of
from microserve.services.router.rollout.shadow_engine import ShadowConnection

DECISION_S = 5.0
"""A shadow that has not decided by then never will."""
MAX_DECIDING = 64
"""Requests beyond it have no shadow."""

OnDecided = Callable[[Strategy, Cost | None, Cost | None, bool], None]
"""The shadow; its cost, None for a mistake; that of what was done; whether both decode on one engine."""

_logger = structlog.get_logger()


@dataclass(slots=True)
class Rehearsal:
    """One request with a shadow: whatever comes last, its decision or the end of the request, settles it."""

    shadow: Strategy
    request: Request
    cached: dict[str, int]
    views: dict[str, EngineView]
    is_decided: bool = False
    decided: Decision | None = None
    """None, when it is decided: a mistake."""
    is_over: bool = False
    done: Decision | None = None
    """What was done about the request; None: it took several attempts, and tells nothing."""


class Shadows:
    """The rehearsals of one router."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        registry: Registry,
        book: LoadBook,
        driver: Driver,
        *,
        lookup: Lookup,
        on_decided: OnDecided,
        seed: int,
    ) -> None:
        """``registry`` and ``book`` are only read. ``seed``: shadows draw their own lots, so that they change
        nobody else's."""
        self._tasks = tasks
        self._book = book
        self._driver = driver
        self._registry = registry
        self._lookup = lookup
        self._on_decided = on_decided
        self._rng = random.Random(seed)
        self._loop = asyncio.get_running_loop()
        self._num_deciding = 0
        self.plans = Plans(
            tasks,
            lambda state: PlanMesh(registry.usable, book, self._rng, state, self._borrow, is_shadow=True),
            run=driver.run_plan,
            tell_end=driver.tell_end,
        )

    def begin(self, shadow: Strategy, request: Request) -> Rehearsal | None:
        """Let it decide; call before the request's own strategy runs. None: too many decide already."""
        if self._num_deciding >= MAX_DECIDING:
            return None
        now = self._loop.time()
        views = {
            c.engine_id: engine_view(c, self._book, now)
            for c in self._registry.usable()
            if fits(request, c.info)
        }
        held = self._lookup(request.tokens, request.salt, request.adapter)
        rehearsal = Rehearsal(shadow, request, held, views)
        self._num_deciding += 1
        task = self._tasks.create_task(
            survive(self._decide(rehearsal), "shadow", request_id=request.request_id),
            name=f"shadow {request.request_id}",
            context=nobodys(),
        )
        task.add_done_callback(lambda _: self._took_decision())
        return rehearsal

    def _took_decision(self) -> None:
        self._num_deciding -= 1

    def end(self, rehearsal: Rehearsal, done: Decision | None) -> None:
        """The request has ended; ``done``: what its strategy decided, if that was carried out."""
        rehearsal.is_over, rehearsal.done = True, done
        self._settle(rehearsal)

    async def _decide(self, rehearsal: Rehearsal) -> None:
        shadow, request = rehearsal.shadow, rehearsal.request
        scope = self._scope(request)
        mesh = self._mesh(scope, self.plans.use(shadow))
        try:
            async with asyncio.timeout(DECISION_S):
                await self._driver.rehearse(shadow, shadow(mesh, request))
            if not scope.decision.engine_id:
                raise StrategyError("the strategy ended without a decision")
            rehearsal.decided = scope.decision
        except Exception as mistake:
            _logger.info(
                log.SHADOW_FAILED,
                request_id=request.request_id,
                strategy=shadow.name,
                strategy_version=shadow.version,
                error=str(mistake) or type(mistake).__name__,
            )
        finally:
            rehearsal.is_decided = True
            scope.close()
        self._settle(rehearsal)

    def _settle(self, rehearsal: Rehearsal) -> None:
        if not (rehearsal.is_decided and rehearsal.is_over):
            return
        decided, done = rehearsal.decided, rehearsal.done
        if decided is None:
            self._on_decided(rehearsal.shadow, None, None, False)
        elif done is not None:
            costs = self._cost(rehearsal, decided), self._cost(rehearsal, done)
            if costs[0] is not None and costs[1] is not None:
                self._on_decided(rehearsal.shadow, *costs, decided.engine_id == done.engine_id)

    def _cost(self, rehearsal: Rehearsal, decision: Decision) -> Cost | None:
        num_tokens = rehearsal.request.num_tokens
        return cost_of(decision, num_tokens, rehearsal.cached, rehearsal.views, self._book.links.transfer_s)

    # --- a mesh that does nothing ------------------------------------------------------------------

    def _scope(self, request: Request) -> RequestScope:
        """With books of its own."""
        clock = PhaseClock(self._loop.time())
        return RequestScope(request, LoadBook().open(), clock, call_timeout_s=DECISION_S)

    def _mesh(self, scope: RequestScope, state: StrategyState) -> Mesh:
        made: dict[Connection, ShadowConnection] = {}

        def connections() -> list[Connection]:
            for real in self._registry.usable():
                if real not in made:
                    made[real] = ShadowConnection(real, lambda real=real: cached(real.engine_id))  # type: ignore[misc]
            return [made[real] for real in self._registry.usable()]

        def cached(engine_id: str) -> int:
            return mesh.prefix(scope.request).get(engine_id, 0)

        mesh = Mesh(scope, connections, self._book, self._lookup, self._rng, state, is_shadow=True)
        return mesh

    def _borrow(
        self, state: StrategyState, tokens: Sequence[int], salt: str, ttl_s: float, adapter: str
    ) -> AbstractAsyncContextManager[tuple[Mesh, Request]]:
        """As for a plan in service, but nothing is done."""

        def make(request: Request) -> tuple[RequestScope, Mesh]:
            scope = self._scope(request)
            return scope, self._mesh(scope, state)

        return borrowed(self._registry.served, "plan", tokens, salt, ttl_s, make, adapter)
