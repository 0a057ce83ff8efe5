"""Requests from admission to their one ``Ended``: runs the strategy, owns the deadline and the cleanup.

One task a request. Whatever happens in it (end, error, cancel, lost gateway, deadline, stop), the scope is
closed before the end is told, so engines and books are free no later than the client knows. Knows gateways
only as an owner and a sink.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress

import structlog

from microserve.protocol import log
from microserve.protocol.errors import (
    Draining,
    InternalError,
    InvalidRequest,
    MeshError,
    StrategyError,
)
from microserve.protocol.messages.engine import Usage
from microserve.protocol.messages.numerics import UNKNOWN
from microserve.protocol.messages.router import Ended, Generate, Output
from microserve.protocol.messages.strategy.decisions import Explanation
from microserve.protocol.process.surviving import surviving
from microserve.protocol.settings.settings import RouterSettings
from microserve.services.links.stream import Tokens
from microserve.services.router.authoring.action.generating import Chunks
from microserve.services.router.authoring.definition import Strategy
from microserve.services.router.authoring.driver import Driver
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.authoring.plan import PlanMesh, Plans, borrowed
from microserve.services.router.authoring.view import StrategyState
from microserve.services.router.engines.connection import Connection, EngineLeaving
from microserve.services.router.engines.load import Account, LoadBook
from microserve.services.router.engines.prefix import Lookup
from microserve.services.router.engines.registry import Registry
from microserve.services.router.oversight.author import nobodys
from microserve.services.router.request.outcome import outcome_of
from microserve.services.router.request.phase import PhaseClock
from microserve.services.router.request.records import Records, names
from microserve.services.router.request.request import RETRY_AFTER_S, Request
from microserve.services.router.request.scope import RequestScope, out_of_time
from microserve.services.router.request.trace import trace_of
from microserve.services.router.request.trail import Trail
from microserve.services.router.rollout.book import StrategyBook
from microserve.services.router.rollout.shadow import OnDecided, Shadows
from microserve.services.router.serving.admission import Admission, Admitted
from microserve.services.router.serving.attempt import Attempts
from microserve.services.router.serving.failover import Failover, MoveFailed, move
from microserve.services.router.serving.live import (
    Interrupt,
    LiveRequest,
    Sink,
    cut_short,
    finished_well,
    head_of,
    write_continued,
    write_line,
)
from microserve.services.router.serving.tally import RouterTally
from microserve.services.router.serving.turnstile import Turnstile
from microserve.services.router.strategies.placing.data_parallel import data_parallel

OnEnd = Callable[[Ended, bool, bool, int], None]
"""How it ended; whether its strategy made a mistake; whether that held the router for too long; prompt tokens
that no engine held when it came."""

MOVE = "move"
"""Stands for a strategy where what an engine that leaves had begun goes on elsewhere."""

_logger = structlog.get_logger()


class Serving:
    """Every live request of this router."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        settings: RouterSettings,
        strategies: StrategyBook,
        registry: Registry,
        *,
        lookup: Lookup,
        rng: random.Random,
        driver: Driver,
        on_end: OnEnd,
        on_decided: OnDecided,
        shadow_seed: int,
    ) -> None:
        """``lookup`` asks the prefix replica; ``driver`` runs the strategies; ``on_end`` hears of every
        request that was admitted, ``on_decided`` of every shadow."""
        self.book = LoadBook()
        self.plans = Plans(
            tasks,
            lambda state: PlanMesh(registry.usable, self.book, rng, state, self._borrow),
            run=driver.run_plan,
            tell_end=driver.tell_end,
        )
        self.shadows = Shadows(
            tasks, registry, self.book, driver, lookup=lookup, on_decided=on_decided, seed=shadow_seed
        )
        self._tasks = tasks
        self._settings = settings
        self._registry = registry
        self.turnstile = Turnstile(registry, settings.max_requests, settings.headroom)
        self._admission = Admission(settings, strategies, registry, self.book, lookup, self.turnstile)
        self.records = Records(settings.record_requests, settings.record_max_mb << 20)
        self.tally = RouterTally()
        self._lookup = lookup
        self._rng = rng
        self._driver = driver
        self._attempts = Attempts(driver, idle_s=settings.strategy_idle_s)
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._live: dict[str, LiveRequest] = {}
        self._stopping = False

    def __len__(self) -> int:
        return len(self._live)

    def submit(self, owner: bytes, message: Generate, token_frame: bytes, sink: Sink) -> None:
        """Serve or refuse; ``sink`` gets the tokens and, exactly once, the end."""
        clock = PhaseClock(self._loop.time())
        live = LiveRequest(message.request_id, owner, sink, self._admission.strategy_name(message), clock)
        live.offset = max(0, message.num_output_tokens)
        live.trace = trace_of(message.traceparent)
        try:
            if self._stopping:
                raise Draining("the router stops", retry_after_s=RETRY_AFTER_S)
            if message.request_id in self._live:
                raise InvalidRequest("a request of that id is live", field="request_id")
            admitted = self._admission.admit(message, token_frame, len(self._live))
            strategy, request, num_uncached, prompt, shadow, live.share, live.num_unheld = admitted
        except MeshError as error:
            self._end(live, error)
            return
        live.num_prompt_tokens = request.num_tokens - request.num_output_tokens
        live.delivered = list(request.tokens[live.num_prompt_tokens :])
        live.served_by = strategy
        live.version, live.revision = strategy.version, message.revision
        has_rows = message.sampling.prompt_logprobs is not None and bool(message.revision)
        live.is_continued = bool(live.delivered) or has_rows
        live.numerics = message.numerics if live.is_continued else None
        if shadow is not None:
            live.rehearsal = self.shadows.begin(shadow, request)
        self._live[live.request_id] = live
        is_due = self._is_due(live, message, num_uncached)
        # What waits here is ahead of nobody else's: it is in the book of the mesh from its turn on.
        account = self.book.open(num_uncached, prompt) if is_due else self.book.open()
        live.scope = self._scope(request, account, clock)
        serving = self._guard(live, live.scope, strategy, None if is_due else admitted)
        live.task = self._tasks.create_task(serving, name=live.request_id, context=nobodys())
        live.task.add_done_callback(lambda _: self._reap(live))

    def _is_due(self, live: LiveRequest, message: Generate, num_tokens: int) -> bool:
        """May it begin at once? One that runs already, elsewhere, has had its turn."""
        if not message.tenant or message.num_output_tokens:
            return True
        sink, turnstile = live.sink, self.turnstile

        def tell(output: Output) -> None:
            if output.token_ids:
                turnstile.computed(live.request_id)
            sink(output)

        live.sink = tell
        return turnstile.enter(live.request_id, message.tenant, message.priority, num_tokens)

    def cancel(self, owner: bytes, request_id: str) -> None:
        """The client is gone. Unknown ids, and those of another owner, are fine."""
        live = self._live.get(request_id)
        if live is not None and live.owner == owner:
            self._interrupt(live, Interrupt.CLIENT)

    def cancel_owner(self, owner: bytes) -> int:
        """All requests of a gateway that is lost; how many there were."""
        lost = [live for live in self._live.values() if live.owner == owner]
        for live in lost:
            self._interrupt(live, Interrupt.CLIENT)
        return len(lost)

    def evacuate(self, connection: Connection) -> None:
        """An engine drains: what is generated there goes on elsewhere, if there is anybody. Call repeatedly:
        the others may come later, and streams may still begin there."""
        if any(other is not connection for other in self._registry.usable()):
            connection.streams.fail_all(lambda: EngineLeaving(connection))

    def stop(self) -> None:
        """Refuse new requests and end the live ones with ``draining``."""
        self._stopping = True
        for live in list(self._live.values()):
            self._interrupt(live, Interrupt.STOP)

    def _interrupt(self, live: LiveRequest, why: Interrupt) -> None:
        if live.interrupt is None and live.task is not None:
            live.interrupt = why
            live.task.cancel()

    # --- one request -------------------------------------------------------------------------------

    async def _guard(
        self, live: LiveRequest, scope: RequestScope, strategy: Strategy, waiting: Admitted | None
    ) -> None:
        """Whatever is wrong with one request, the others' group does not end by it."""
        try:
            if waiting is not None:
                scope = await self._turn(live, scope, waiting)
            await self._serve(live, scope, strategy)
        except Exception as error:
            _logger.exception(log.REQUEST_FAILED, request_id=live.request_id, error=str(error))
            if not live.ended:
                with surviving("end of a request", request_id=live.request_id):
                    self._end(live, InternalError("see the router's log"))

    async def _turn(self, live: LiveRequest, scope: RequestScope, waiting: Admitted) -> RequestScope:
        """Wait for its turn; the scope in which it is served then. One whose time is up meanwhile goes on at
        once, and ends as any that is out of time."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(scope.request.deadline):
                await self.turnstile.wait(live.request_id)
        scope.close()
        account = self.book.open(waiting.num_uncached, waiting.prompt)
        live.scope = self._scope(scope.request, account, live.clock)
        return live.scope

    async def _serve(self, live: LiveRequest, scope: RequestScope, strategy: Strategy) -> None:
        """Attempts, each in a scope of its own, until one ends the stream or its error is final."""
        failover = Failover(scope.request.begun(), patience_s=self._settings.call_timeout_s)
        finished = failover.end_of(live.delivered, self._registry.served, live.capped)
        if finished is not None:  # all that its last router did not tell any more was the end
            live.last = Tokens(len(live.delivered), [], [], finished)
            self._end(live, None)
            return
        source: Connection | None = None
        wanted = ""
        generator: Chunks | None = None
        while True:
            served = self._registry.served
            error = live.replaced_by(served.revision if served is not None else "")
            if error is not None:
                break
            mesh, num_known = self._mesh(live, scope, failover, strategy), len(live.delivered)
            live.author, live.alone = None, failover.alone
            if source is not None:
                self._record(live, scope, MOVE, 0)
                generator = move(mesh, scope.request, source, wanted)
            else:
                # Requests that came together with one that hung must not hang in turn.
                chosen = data_parallel if failover.terms.is_plain else self._admission.current(strategy)
                self._record(live, scope, chosen.name, chosen.version)
                generator = chosen(mesh, scope.request)
                live.author = self._driver.author(chosen)
            error = await self._attempts.run(live, scope, generator)
            now = self._loop.time()
            if error is None or live.interrupt:
                break
            terms = failover.decide(error, scope.engines, now)
            if terms is None:
                if isinstance(error, MoveFailed):  # only for lack of time is a failed move the end
                    error = out_of_time()
                break
            self.tally.failovers[error.code] += 1
            scope.close()
            live.trace.failed("" if isinstance(error, EngineLeaving) else error.code)
            await self._attempts.close(live, generator)
            live.engines += [engine_id for engine_id in scope.engines if engine_id not in live.engines]
            source = None
            if isinstance(error, EngineLeaving):
                # Of what was generated in this attempt the leaving engine has the KV.
                source = error.source if len(live.delivered) > num_known else None
                wanted = error.wanted
            write_continued(live, error, terms.number)
            finished = failover.end_of(live.delivered, self._registry.served, live.capped)
            if finished is not None:
                error, live.last = None, Tokens(len(live.delivered), [], [], finished)
                break
            try:
                await asyncio.sleep(min(terms.pause_s, max(0.0, scope.request.deadline - now)))
            except asyncio.CancelledError:
                error = live.interruption
                break
            request = failover.continued(live.delivered, live.capped)
            scope = live.scope = self._scope(request, self.book.open(), live.clock)
        self._end(live, error)
        if generator is not None:
            await self._attempts.close(live, generator)

    def _record(self, live: LiveRequest, scope: RequestScope, strategy: str, version: int) -> None:
        """An attempt begins."""
        scope.traceparent = live.trace.begin(strategy, version)
        live.num_moves += strategy == MOVE
        if self.records.is_on:
            times, sights = (live.clock.received, self._loop.time()), self.records.sights
            scope.trail = Trail(strategy, version, scope.request.num_tokens, scope.decision, *times, sights)
            live.trails.append(scope.trail)

    def explain(self, wanted: str) -> tuple[list[Explanation], int]:
        """What is remembered of the requests of which ``wanted`` is a name, those that run first; and how
        many more there are than go into one message."""
        named = names(wanted)
        running = [
            self.records.describe(live.request_id, head_of(live, live.scope.request, None), live.trails)
            for live in self._live.values()
            if live.scope is not None and named(live.request_id)
        ]
        return self.records.find(wanted, self._loop.time(), running)

    def _mesh(self, live: LiveRequest, scope: RequestScope, failover: Failover, strategy: Strategy) -> Mesh:
        avoid, began = failover.terms.avoid, live.numerics or UNKNOWN

        def connections() -> Sequence[Connection]:
            everyone = self._registry.usable()
            left = [c for c in everyone if c.engine_id not in avoid] or everyone
            if not began.is_exact:
                return left
            # As long as there is an engine of its class, what began bit for bit sees no other.
            return [c for c in left if c.info.numerics == began] or left

        state = self.plans.use(strategy)
        return Mesh(scope, connections, self.book, self._lookup, self._rng, state, began.name)

    def _borrow(
        self, state: StrategyState, tokens: Sequence[int], salt: str, ttl_s: float, adapter: str
    ) -> AbstractAsyncContextManager[tuple[Mesh, Request]]:
        """A request of a plan, in the books like any other."""

        def make(request: Request) -> tuple[RequestScope, Mesh]:
            scope = self._scope(request, self.book.open(), PhaseClock(self._loop.time()))
            return scope, Mesh(scope, self._registry.usable, self.book, self._lookup, self._rng, state)

        request_id = f"plan-{self._rng.getrandbits(62):x}"
        return borrowed(self._registry.served, request_id, tokens, salt, ttl_s, make, adapter)

    def _scope(self, request: Request, account: Account, clock: PhaseClock) -> RequestScope:
        return RequestScope(request, account, clock, call_timeout_s=self._settings.call_timeout_s)

    # --- the end -----------------------------------------------------------------------------------

    def _reap(self, live: LiveRequest) -> None:
        """A task that was cancelled before its first step has not told the end."""
        if not live.ended:
            self._end(live, live.interruption)

    def _end(self, live: LiveRequest, error: MeshError | None) -> None:
        """Close the scope, tell the end, write the canonical line. Without error or last chunk: aborted."""
        live.ended = True
        scope, chunk = live.scope, live.last if error is None else None
        finished = chunk.finished if chunk is not None else None
        engines: list[str] = []
        if scope is not None:
            if self._live.get(live.request_id) is live:
                del self._live[live.request_id]
                self.turnstile.leave(live.request_id, len(live.delivered))
            for grant_id, engine_id in scope.unused.items() if finished is not None else ():
                self._attempts.blame(live, StrategyError(f"forgotten grant {grant_id} of engine {engine_id}"))
            engines = [*live.engines, *(e for e in scope.engines if e not in live.engines)]
            scope.close()
        now = self._loop.time()
        if chunk is not None and finished is not None:
            phases = live.clock.phases(now, finished.timings)
            ended = finished_well(live, finished, phases, engines)
            last = Output(live.request_id, chunk.offset, chunk.token_ids, chunk.logprobs, ended)
        else:
            usage = Usage(prompt_tokens=live.num_prompt_tokens, output_tokens=len(live.delivered))
            phases = live.clock.phases(now)
            ended = cut_short(live, error, usage, phases, engines)
            last = Output(live.request_id, max(live.offset, len(live.delivered)), [], [], ended)
        live.trace.stop(ended.code)
        live.sink(last)
        write_line(live.request_id, ended, live.codings)
        self.tally.coded(coding for _, coding in live.codings)
        self.tally.ended(ended, live.trails, failed=live.is_blamed, slow=live.is_slow)
        live.trace.tell(live.request_id, ended, live.trails)
        if live.rehearsal is not None and scope is not None:
            told = finished is not None and not live.engines and bool(scope.decision.engine_id)
            self.shadows.end(live.rehearsal, scope.decision if told else None)
        if scope is not None:
            head = head_of(live, scope.request, ended)
            self.records.add(live.request_id, head, live.trails, now)
            self._on_end(ended, live.is_blamed, live.is_slow, live.num_unheld)
            self._tell_end(live, scope.request, ended)

    def _tell_end(self, live: LiveRequest, request: Request, ended: Ended) -> None:
        """To those of its strategies that want to hear of it."""
        hearing = [(self.plans, live.served_by)]
        if live.rehearsal is not None:
            hearing.append((self.shadows.plans, live.rehearsal.shadow))
        for plans, strategy in hearing:
            if strategy is not None and strategy.on_end is not None:
                outcome = outcome_of(ended, is_own=not (live.is_blamed or live.engines or live.alone))
                plans.ended(strategy, request.begun(), outcome)
