"""The router process: engines below, gateways above, strategies between, wired into one task group."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Collection, Sequence
from importlib.metadata import version

import structlog

from microserve.protocol import log
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import ConfigError, StrategyNotFound
from microserve.protocol.messages.check import PairCheck, Suspect
from microserve.protocol.messages.engine import EngineInfo
from microserve.protocol.messages.index import Watch
from microserve.protocol.messages.router import RouterHeartbeat, RouterWelcome
from microserve.protocol.messages.strategy.control import ControlState
from microserve.protocol.messages.strategy.decisions import Answer, Question
from microserve.protocol.metrics.port import MetricsPort
from microserve.protocol.metrics.readings import Readings
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.process.pace import Pace
from microserve.protocol.process.tick import at_rest
from microserve.protocol.settings.faults import did_you_mean
from microserve.protocol.settings.settings import RouterSettings, Settings
from microserve.services.links.engine import EngineConnection, RouterIdentity
from microserve.services.links.index_watch import IndexWatch
from microserve.services.router.authoring.definition import Strategy, load_file
from microserve.services.router.authoring.driver import Driver
from microserve.services.router.check.check import SelfCheck
from microserve.services.router.engines.prefix import PrefixReplica
from microserve.services.router.engines.registry import Registry
from microserve.services.router.gateways import Gateways
from microserve.services.router.metrics import router_readings
from microserve.services.router.oversight.overseer import Overseer
from microserve.services.router.oversight.stuck import StuckTrace
from microserve.services.router.rollout.book import StrategyBook
from microserve.services.router.rollout.control import StrategyControl
from microserve.services.router.serving.serving import Serving
from microserve.services.router.source.module import Run, run_freely
from microserve.services.router.strategies import BUILT_IN

_logger = structlog.get_logger()


def load_strategies(settings: RouterSettings, run: Run = run_freely) -> StrategyBook:
    """Built-in strategies and the operator's files, with the operator's parameters. ``run`` bounds the files.

    Raises :class:`ConfigError` that names the setting.
    """
    found = [*BUILT_IN]
    for path in settings.strategy_files:
        found += load_file(path, run)
    book = StrategyBook(found)
    book.configure(settings.strategies)
    try:
        book.get(settings.default_strategy)
    except StrategyNotFound as error:
        meant = did_you_mean(settings.default_strategy, book.names)
        detail = f"router.default_strategy: {error.detail}{meant}"
        raise ConfigError(detail, field="router.default_strategy") from None
    return book


class Router:
    """One life of a router; ``run`` once."""

    def __init__(
        self,
        settings: Settings,
        bus: Bus,
        *,
        seed: int | None = None,
        overseer: Overseer | None = None,
        culprits: Collection[str] = (),
    ) -> None:
        """``seed`` fixes every choice by lot and the incarnation; ``overseer`` times the strategies;
        ``culprits``: source files of which code stopped an earlier life for good.

        Raises :class:`ConfigError`, and ``OSError`` when the address is taken.
        """
        self._settings = settings
        self._bus = bus
        self._rng = random.Random(secrets.randbits(64) if seed is None else seed)
        incarnation = self._rng.getrandbits(62) | 1
        self.identity = RouterIdentity(settings.router.id or f"router-{incarnation:x}", incarnation)
        run = run_freely if overseer is None else overseer.call
        self.strategies = load_strategies(settings.router, run)
        self.control = StrategyControl(
            self.strategies,
            asyncio.get_running_loop().time,
            on_retired=self._retire,
            on_applied=self._take_over,
            run=run,
            culprits=culprits,
        )
        self._version = version("microserve")
        self._tasks = asyncio.TaskGroup()
        self.pace = Pace(settings.bus.heartbeat_interval_s, settings.bus.liveness, self._is_busy)
        self.prefixes = PrefixReplica(bus, max_nbytes=settings.router.index_max_mb << 20)
        self.registry = Registry(
            bus,
            self._tasks,
            self.identity,
            settings.bus,
            self.pace,
            call_timeout_s=settings.router.call_timeout_s,
            on_joined=self.prefixes.joined,
            on_ended=self._forget,
            on_draining=self._evacuate,
        )
        self.serving = Serving(
            self._tasks,
            settings.router,
            self.strategies,
            self.registry,
            lookup=self.prefixes.lookup,
            rng=self._rng,
            driver=Driver(overseer, self.control.hung),
            on_end=self.control.ended,
            on_decided=self.control.decided,
            shadow_seed=incarnation,
        )
        self.check = SelfCheck(
            settings.router.check_interval_s,
            self.identity,
            self.registry,
            self.serving.book,
            call_timeout_s=settings.router.call_timeout_s,
            has_room=lambda: not self.serving.turnstile.num_waiting,
            on_news=self.pace.stir,
        )
        self.index = IndexWatch(bus, settings.index.address, settings.bus, self, self.pace)
        try:
            self.gateways = Gateways(
                bus,
                settings.router.address,
                self.serving,
                settings.bus,
                self.pace,
                welcome=self._welcome,
                heartbeat=self._heartbeat,
            )
        except BaseException:
            self.index.close()
            self.registry.close()
            raise

    @property
    def address(self) -> str:
        """Where gateways connect."""
        return self.gateways.address

    # --- what the index says (links/index_watch.py) ------------------------------------------------

    def watch(self) -> Watch:
        control = self.control
        bus = self._settings.bus
        control.beat(self.pace.next_s or at_rest(bus.heartbeat_interval_s, bus.liveness))
        return Watch(
            self.identity.router_id,
            control.version,
            control.faults,
            control.shadows.scores(),
            self.strategies.serves(),
            self._settings.router.default_strategy,
            answers=True,
            trials=control.trials.told(asyncio.get_running_loop().time()),
            gateways=self.gateways.urls,
            version=self._version,
            checks=self.check.book.news(),
        )

    def checks(self) -> list[PairCheck]:
        return self.check.told()

    def take_members(self, infos: list[EngineInfo], *, is_first: bool) -> None:
        self.registry.take_members(infos, is_first=is_first)
        self.check.look()

    def take_suspects(self, suspects: list[Suspect], routers: list[str], *, is_first: bool) -> None:
        self.check.take(suspects, routers, is_first=is_first)

    def take_control(self, state: ControlState) -> None:
        if self.control.apply(state):
            self.registry.set_labels(state.labels)
            self.serving.records.sights.forget()

    def answer(self, question: Question) -> Answer:
        if question.scores_of is not None:
            board, now = self.control.scoreboard, asyncio.get_running_loop().time()
            scores, num_left_out = board.told(now, question.scores_of)
            return Answer(question.question_id, self.identity.router_id, [], num_left_out, len(board), scores)
        found, num_left_out = self.serving.explain(question.request_id)
        num_kept = len(self.serving.records)
        return Answer(question.question_id, self.identity.router_id, found, num_left_out, num_kept)

    def readings(self) -> Readings:
        """What is measured here, as it is now."""
        return router_readings(
            self.identity.router_id,
            self._settings.router,
            self._bus,
            self.serving,
            self.registry,
            self.prefixes,
            self.strategies,
            self.control,
            self.gateways,
            self.check,
        )

    # --- what follows from what --------------------------------------------------------------------

    def _retire(self, strategy: Strategy) -> None:
        self.serving.plans.drop(strategy)

    def _take_over(self, serving: list[Strategy], shadows: list[Strategy]) -> None:
        self.serving.plans.rebind(serving)
        self.serving.shadows.plans.keep(shadows)

    async def run(self, lifecycle: Lifecycle) -> None:
        """Serve until cancelled; then live requests end with ``draining`` and engines drop their parts."""
        try:
            async with self._tasks as tasks:
                tasks.create_task(self.index.run(), name="index watch")
                tasks.create_task(self.registry.run(), name="registry")
                tasks.create_task(self.gateways.run(), name="gateways")
                tasks.create_task(self.check.run(), name="self-check")
                lifecycle.ready(self.address)
                try:
                    await asyncio.Event().wait()
                finally:
                    self.index.stop()
                    self.registry.stop()
                    self.serving.stop()
        finally:
            self.prefixes.close()
            self.gateways.close()
            self.index.close()
            self.registry.close()

    def _is_busy(self) -> bool:
        return bool(len(self.serving)) or not self.gateways.are_idle or self.registry.is_busy

    def _forget(self, connection: EngineConnection) -> None:
        self.prefixes.ended(connection)
        self.serving.book.forget(connection.engine_id)

    def _evacuate(self, connection: EngineConnection) -> None:
        self.serving.evacuate(connection)
        self.check.look()

    def _welcome(self) -> RouterWelcome:
        served = self.registry.served
        return RouterWelcome(
            self.identity.router_id,
            self.identity.incarnation,
            served.model if served else "",
            self.registry.max_model_len,
            served.vocab_size if served else 0,
            len(self.registry.joined()),
            self.strategies.names,
            self._settings.router.default_strategy,
            served.eos_token_ids if served else [],
            served.revision if served else "",
            paced=True,
            adapters=self.registry.adapters,
        )

    def _heartbeat(self, next_s: float) -> RouterHeartbeat:
        served = self.registry.served
        return RouterHeartbeat(
            self.identity.incarnation,
            len(self.registry.joined()),
            len(self.serving),
            self._settings.router.max_requests,
            served.model if served else "",
            self.registry.max_model_len,
            served.vocab_size if served else 0,
            served.eos_token_ids if served else [],
            served.revision if served else "",
            next_s,
            *_load_of(self.registry.joined()),
            adapters=self.registry.adapters,
        )


def _load_of(engines: Sequence[EngineConnection]) -> tuple[int, int, float]:
    """Sequences that run and requests that wait, and the share of blocks in use, of all of them together."""
    num_blocks = sum(each.info.num_blocks for each in engines)
    num_used = num_blocks - sum(min(each.load.free_blocks, each.info.num_blocks) for each in engines)
    return (
        sum(each.load.num_running for each in engines),
        sum(each.load.num_waiting for each in engines),
        num_used / num_blocks if num_blocks else 0.0,
    )


async def run_router(settings: Settings, bus: Bus, lifecycle: Lifecycle | None = None) -> None:
    """Serve until cancelled. Raises :class:`ConfigError`, or ``OSError`` when the address is taken."""
    stuck = _stuck_trace(settings.router.trace_path)
    with Overseer(settings.router.strategy_budget_s, stuck) as overseer:
        culprits = stuck.culprits if stuck is not None else ()
        try:
            router = Router(settings, bus, overseer=overseer, culprits=culprits)
            with MetricsPort(settings.metrics.host, settings.router.metrics_port, router.readings):
                await router.run(lifecycle or Lifecycle())
        finally:
            if stuck is not None:
                stuck.close()


def _stuck_trace(path: str) -> StuckTrace | None:
    """None: it is not wanted, or not to be had; a router serves without."""
    try:
        return StuckTrace(path) if path else None
    except OSError as error:
        _logger.warning(log.STATE_UNWRITTEN, path=path, error=str(error))
        return None
