"""What a strategy keeps between requests: its state, and the plan that it runs in the background.

Owned by the router: made when a strategy serves its first request, gone with the strategy. A plan that
raises begins again after a pause that doubles, one that hangs does not; it cannot take a request along.
Knows no sockets.
"""

from __future__ import annotations

import asyncio
import random
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog

from microserve.protocol import log
from microserve.protocol.errors import CapacityError, NoEngines, PeerError
from microserve.protocol.messages.engine import EngineInfo
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.router.authoring.definition import Strategy, StrategyFunction
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.authoring.view import MeshView, StrategyState
from microserve.services.router.engines.connection import Connection
from microserve.services.router.engines.load import LoadBook
from microserve.services.router.oversight.author import nobodys
from microserve.services.router.oversight.overseer import Condemned, StrategyHung
from microserve.services.router.request.outcome import Outcome
from microserve.services.router.request.request import RETRY_AFTER_S, Request
from microserve.services.router.request.scope import RequestScope, out_of_time

MIN_PAUSE_S, MAX_PAUSE_S = 0.1, 30.0
"""Before a plan that raised begins again; one that ran for longer than the last pause starts afresh."""

_logger = structlog.get_logger()

Borrow = Callable[
    [StrategyState, Sequence[int], str, float, str], AbstractAsyncContextManager[tuple[Mesh, Request]]
]
"""Makes a request of the router's own: the strategy's state, tokens, salt, seconds that it may take, the name
of an adapter."""


@asynccontextmanager
async def borrowed(
    served: EngineInfo | None,
    request_id: str,
    tokens: Sequence[int],
    salt: str,
    ttl_s: float,
    make: Callable[[Request], tuple[RequestScope, Mesh]],
    adapter: str,
) -> AsyncIterator[tuple[Mesh, Request]]:
    """A request of a plan, for at most ``ttl_s``: with a scope like any other, but nobody waits for it.

    ``served``: what the mesh serves. Raises ``NoEngines``, ``DeadlineExceeded``.
    """
    if served is None:
        raise NoEngines("no engine has joined yet", retry_after_s=RETRY_AFTER_S)
    deadline = asyncio.get_running_loop().time() + ttl_s
    sampling, size = SamplingParams(max_tokens=1), served.block_size
    request = Request(request_id, tokens, sampling, deadline, size, salt, adapter=adapter)
    scope, mesh = make(request)
    limit = asyncio.timeout_at(deadline)
    try:
        async with limit:
            yield mesh, request
    except TimeoutError:
        if not limit.expired():
            raise
        raise out_of_time() from None
    finally:
        scope.close()


class PlanMesh(MeshView):
    """The mesh as a plan sees it: membership, load and links at any time, actions inside :meth:`request`."""

    def __init__(
        self,
        connections: Callable[[], Sequence[Connection]],
        book: LoadBook,
        rng: random.Random,
        state: StrategyState,
        borrow: Borrow,
        *,
        is_shadow: bool = False,
    ) -> None:
        super().__init__(connections, book, rng, state, is_shadow=is_shadow)
        self._borrow = borrow

    def request(
        self, tokens: Sequence[int], *, salt: str = "", ttl_s: float = 30.0, adapter: str = ""
    ) -> AbstractAsyncContextManager[tuple[Mesh, Request]]:
        """A request that no client has asked for: ``async with mesh.request(tokens) as (mesh, request):``.

        Inside, everything that a strategy can do can be done; whatever it holds is given back at the end of
        the block, and all of it must happen within ``ttl_s``. ``salt`` and ``adapter``: whose KV it is about,
        as those of a request are. Raises ``NoEngines``, ``DeadlineExceeded``.
        """
        return self._borrow(self.state, tokens, salt, ttl_s, adapter)


@dataclass
class _Kept:
    """Of one strategy in use."""

    state: StrategyState = field(default_factory=StrategyState)
    plan: asyncio.Task[None] | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    """That the plan was started with."""


class Plans:
    """States and plans by strategy; two versions of a strategy are two functions, and share nothing."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        make_mesh: Callable[[StrategyState], PlanMesh],
        *,
        run: Callable[[Strategy, PlanMesh], Awaitable[None]],
        tell_end: Callable[[Strategy, PlanMesh, Request, Outcome], Awaitable[None]],
    ) -> None:
        """``run``: a strategy's plan, once; ``tell_end``: its ``on_end``."""
        self._tasks = tasks
        self._make_mesh = make_mesh
        self._run_once = run
        self._tell_end = tell_end
        self._kept: dict[StrategyFunction, _Kept] = {}
        self._dropped: weakref.WeakSet[StrategyFunction] = weakref.WeakSet()

    def use(self, strategy: Strategy) -> StrategyState:
        """The strategy is about to serve a request: its state. Starts its plan with the parameters of now."""
        kept = self._kept.get(strategy.function)
        if kept is None and strategy.function in self._dropped:
            return StrategyState()  # a request that outlives the version that it began with
        if kept is None:
            kept = self._kept[strategy.function] = _Kept()
            self._start(strategy, kept)
        return kept.state

    def _start(self, strategy: Strategy, kept: _Kept) -> None:
        if strategy.plan is not None:
            mesh = self._make_mesh(kept.state)
            kept.plan = self._tasks.create_task(
                self._run(strategy, mesh), name=f"plan {strategy.name}", context=nobodys()
            )
            kept.values = strategy.values

    def ended(self, strategy: Strategy, request: Request, outcome: Outcome) -> None:
        """Let the strategy hear of it, soon; whatever comes of that touches no request."""
        kept = self._kept.get(strategy.function)
        if strategy.on_end is not None and kept is not None:
            telling = self._tell(strategy, self._make_mesh(kept.state), request, outcome)
            self._tasks.create_task(telling, name=f"on_end {request.request_id}", context=nobodys())

    async def _tell(self, strategy: Strategy, mesh: PlanMesh, request: Request, outcome: Outcome) -> None:
        try:
            await self._tell_end(strategy, mesh, request, outcome)
        except Condemned:
            pass
        except Exception as error:
            _logger.error(
                log.STRATEGY_FAILED,
                request_id=request.request_id,
                strategy=strategy.name,
                strategy_version=strategy.version,
                error=f"on_end: {type(error).__name__}: {error}",
                exc_info=error,
            )

    def rebind(self, strategies: Iterable[Strategy]) -> None:
        """These are in force now: plans that run with other parameters begin again; states stay."""
        for strategy in strategies:
            kept = self._kept.get(strategy.function)
            if kept is not None and kept.plan is not None and kept.values != strategy.values:
                kept.plan.cancel()
                self._start(strategy, kept)

    def drop(self, strategy: Strategy) -> None:
        """The strategy is not in use any more: forget its state, cancel its plan. Unknown ones are fine."""
        self._dropped.add(strategy.function)
        kept = self._kept.pop(strategy.function, None)
        if kept is not None and kept.plan is not None:
            kept.plan.cancel()

    def keep(self, strategies: Iterable[Strategy]) -> None:
        """Drop all others; they may come back."""
        kept = {strategy.function for strategy in strategies}
        for function in [function for function in self._kept if function not in kept]:
            gone = self._kept.pop(function)
            if gone.plan is not None:
                gone.plan.cancel()

    async def _run(self, strategy: Strategy, mesh: PlanMesh) -> None:
        """Until the plan returns or is cancelled."""
        loop, pause_s = asyncio.get_running_loop(), 0.0
        while True:
            began = loop.time()
            try:
                await self._run_once(strategy, mesh)
                return
            except Condemned:
                return
            except StrategyHung as error:
                _logger.error(log.PLAN_FAILED, strategy=strategy.name, error=str(error), exc_info=error)
                return
            except Exception as error:
                ran_long = loop.time() - began > max(pause_s, MIN_PAUSE_S)
                pause_s = MIN_PAUSE_S if ran_long else min(max(2 * pause_s, MIN_PAUSE_S), MAX_PAUSE_S)
                # An engine that failed or is full is no fault of the author's.
                tell = _logger.warning if isinstance(error, PeerError | CapacityError) else _logger.error
                tell(
                    log.PLAN_FAILED,
                    strategy=strategy.name,
                    error=str(error) or type(error).__name__,
                    pause_s=pause_s,
                    exc_info=error,
                )
            await asyncio.sleep(pause_s)
