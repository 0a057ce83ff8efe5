"""A whole mesh in one process, under one clock: index, routers, engines and gateways, each of which may die.

Owns the processes: starts, kills, freezes, restarts them under new incarnations. Every service is the real
one (of a gateway its side towards routers: gateway.py says why); a simulated process differs in its bus,
its clock, its heap and its model. Knows no schedule of faults (fault.py) and judges nothing (judge.py).
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from microserve.kvcache.heap.local import MemoryRegistry
from microserve.protocol.errors import InternalError
from microserve.protocol.messages.numerics import Numerics
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.process.tick import between_signs
from microserve.protocol.settings.engine import EngineSettings, KvCacheSettings
from microserve.protocol.settings.settings import BusSettings, IndexSettings, RouterSettings, Settings
from microserve.services.index.service import IndexService
from microserve.services.router.authoring.definition import Strategy
from microserve.services.router.oversight.overseer import Overseer
from microserve.services.router.service import Router
from microserve.services.simulation.bus import Addresses, SimBus
from microserve.services.simulation.engine.engine import SimEngine
from microserve.services.simulation.engine.hash_runner import HASH
from microserve.services.simulation.engine.witness import Witness
from microserve.services.simulation.gateway import SimGateway
from microserve.services.simulation.journal import Journal
from microserve.services.simulation.loop import Process, VirtualLoop
from microserve.services.simulation.network import Network

INDEX = "index"
LOOK_S = 0.25
"""Between two looks at whether it is so far."""
RESTART_S = 0.3
"""A supervisor starts a process that has ended by itself after so long."""


WIDE = 16
"""Times that a hash is in a row where codecs are to make it smaller."""
WITH_CODEC = ("disaggregated", "cache_aware")
"""Strategies that send by a codec where a mesh has one."""


@dataclass(frozen=True)
class Shape:
    """How large a mesh, and how its services are set."""

    num_engines: int = 2
    num_routers: int = 1
    num_gateways: int = 1
    num_blocks: int = 64
    block_size: int = 4
    grant_slots: int = 16
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 24
    max_waiting: int = 32
    max_model_len: int = 160
    max_requests: int = 256
    credit: int = 16
    lease_s: float = 2.0
    call_timeout_s: float = 3.0
    check_interval_s: float = 0.0
    """0: what happens in a world is what its schedule says, and no more."""
    drain_s: float = 3.0
    stuck_s: float = 3.0
    heartbeat_s: float = 0.25
    liveness: int = 6
    strategies: tuple[Strategy, ...] = ()
    """That routers know beside those that they come with."""
    labels: tuple[tuple[str, ...], ...] = ()
    """By number of engine; engines without an entry have none."""
    clusters: tuple[str, ...] = ()
    """By number of engine; engines without an entry have none."""
    numerics: tuple[Numerics, ...] = ()
    """By number of engine: in which class it computes, and rows are marked with it. Empty: all in one."""
    codec: str = ""
    """By which the strategies that know one send KV; rows are wide then. Empty: as it is."""
    max_skew_s: float = 600.0
    """Clocks of processes stand apart by up to so much."""


@dataclass
class Seat:
    """A place in the mesh, and the process that sits there now."""

    name: str
    process: Process | None = None
    main: asyncio.Task[None] | None = None
    num_lives: int = 0
    service: Any = None
    """The ``IndexService``, ``Router``, ``SimEngine`` or ``SimGateway`` of this life."""

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.is_alive


@dataclass
class SimulatedMesh:
    """Make it, ``start`` all seats, let time pass. One at a time in a Python process (it takes structlog)."""

    loop: VirtualLoop
    seed: int
    shape: Shape
    journal: Journal
    rng: random.Random = field(init=False)
    seats: dict[str, Seat] = field(init=False)
    overseer: Overseer | None = None
    """Times strategies by the real clock, so what comes of that does not repeat."""
    past: list[SimGateway] = field(default_factory=list)
    """Gateways of earlier lives: what became of their requests."""
    counters: Counter[str] = field(default_factory=Counter)
    """What engines had counted when they were killed."""

    def __post_init__(self) -> None:
        self.rng = random.Random(f"world {self.seed}")  # the text is a part of what a seed means
        self.network = self._make_network(random.Random(f"network {self.seed}"))
        self.addresses = Addresses(self.network)
        self.registry = MemoryRegistry()
        self.witness = Witness(lambda: self.loop.now)
        self.engines = [f"engine-{n}" for n in range(self.shape.num_engines)]
        self.routers = [f"router-{n}" for n in range(self.shape.num_routers)]
        self.gateways = [f"gateway-{n}" for n in range(self.shape.num_gateways)]
        names = [INDEX, *self.engines, *self.routers, *self.gateways]
        self.seats = {name: Seat(name) for name in names}

    def _make_network(self, rng: random.Random) -> Network:
        return Network(self.loop, rng)

    # --- lives -------------------------------------------------------------------------------------

    def start_all(self) -> None:
        for name in self.seats:
            self.start(name)

    def start(self, name: str) -> None:
        """A new life in a seat whose old one has ended; no effect on a living one."""
        seat = self.seats[name]
        if seat.is_alive:
            return
        skew_s = self.rng.uniform(0.0, self.shape.max_skew_s)
        seat.process = process = Process(self.loop, name, clock_offset_s=skew_s)
        seat.num_lives += 1
        self.journal.note("sim.started", seat=name, life=seat.num_lives)
        bus = SimBus(self.addresses, process)
        # Constructed inside the process: what it schedules while being made is its own.
        seat.main = process.spawn(self._main(seat, process, bus))

    async def _main(self, seat: Seat, process: Process, bus: SimBus) -> None:
        try:
            await self._serve(seat, process, bus)
        except asyncio.CancelledError:
            pass
        finally:
            if process.is_alive:  # it has ended by itself
                self.loop.call_soon(self._ended, seat, process)

    def _serve(self, seat: Seat, process: Process, bus: SimBus) -> Coroutine[Any, Any, None]:
        incarnation, seed = self.rng.getrandbits(62) | 1, self.rng.getrandbits(32)
        kind = seat.name.partition("-")[0]
        settings = self.settings(seat.name)
        if kind == INDEX:
            return self._run_index(seat, bus, settings, incarnation)
        if kind == "router":
            seat.service = router = Router(settings, bus, seed=seed, overseer=self.overseer)
            for strategy in self.shape.strategies:
                router.strategies.add(strategy)
            return router.run(Lifecycle())
        if kind == "engine":
            seat.service = engine = self._make_engine(process, settings, bus, incarnation, seed)
            return engine.run()
        gateway = SimGateway(
            self.loop,
            process,
            bus,
            [self.address(name) for name in self.routers],
            gateway_id=seat.name,
            incarnation=incarnation,
            settings=settings.bus,
        )
        if seat.service is not None:
            self.past.append(seat.service)
        seat.service = gateway
        return gateway.run()

    def _make_engine(
        self, process: Process, settings: Settings, bus: SimBus, incarnation: int, seed: int
    ) -> SimEngine:
        numerics = self.numerics(settings.engine.id)
        return SimEngine(
            self.loop,
            process,
            settings,
            bus,
            self.registry,
            self.witness,
            incarnation=incarnation,
            seed=seed,
            numerics=numerics,
            mark=self.mark(numerics),
            width=WIDE if self.shape.codec else 1,
        )

    async def _run_index(self, seat: Seat, bus: SimBus, settings: Settings, incarnation: int) -> None:
        seat.service = service = IndexService(
            bus,
            address=settings.index.address,
            settings=settings.bus,
            max_nbytes=settings.index.max_mb << 20,
            incarnation=incarnation,
        )
        look_s = between_signs(settings.bus.heartbeat_interval_s, settings.bus.liveness) / 2
        try:
            while True:
                await asyncio.sleep(look_s)
                service.tick()
        finally:
            service.close()

    def _ended(self, seat: Seat, process: Process) -> None:
        """A process that ended by itself is as gone as a killed one; its supervisor starts it again."""
        if seat.process is process and process.is_alive:
            self.journal.note("sim.ended", seat=seat.name)
            self.kill(seat.name)
            self.loop.at(self.loop.now + RESTART_S, self.start, seat.name)

    def kill(self, name: str) -> None:
        """As SIGKILL: nothing that it was about to do happens any more."""
        seat = self.seats[name]
        process = seat.process
        if process is None or not process.is_alive:
            return
        self.journal.note("sim.killed", seat=name)
        service = seat.service
        if isinstance(service, SimEngine):
            service.pacer.kill()
            self.witness.leave(service.core.incarnation)
            self.registry.kill(service.core.incarnation)
            self.counters += service.core.state.counters
        process.kill()
        self.addresses.crash(process)
        if isinstance(service, SimGateway):
            for answer in service.answers.values():
                if not answer.outcome:
                    service.end(answer, "gateway_lost")

    def terminate(self, name: str) -> None:
        """As SIGTERM: it drains and leaves."""
        seat = self.seats[name]
        if seat.is_alive and seat.main is not None:
            self.journal.note("sim.terminated", seat=name)
            seat.main.cancel()

    def close(self) -> None:
        for name in reversed(list(self.seats)):
            self.kill(name)

    def check_integrity(self) -> list[str]:
        """Blocks and sequences of every living engine where something has changed since the last look,
        between any two steps. Violations, as text."""
        broken = []
        for name in self.engines:
            seat = self.seats[name]
            if not seat.is_alive or seat.service is None or not seat.service.has_changed():
                continue
            try:
                seat.service.core.check_integrity()
            except InternalError as error:
                broken.append(f"integrity: {name} at {self.loop.now:.3f}: {error.detail}")
        return broken

    # --- names -------------------------------------------------------------------------------------

    def address(self, name: str) -> str:
        return f"inproc://{name}"

    def settings(self, name: str) -> Settings:
        shape = self.shape
        is_engine = name in self.engines
        number = int(name.partition("-")[2] or 0)
        labels = shape.labels[number] if is_engine and number < len(shape.labels) else ()
        return Settings(
            bus=BusSettings(
                heartbeat_interval_s=shape.heartbeat_s,
                liveness=shape.liveness,
                stuck_s=shape.stuck_s,
                credit=shape.credit,
            ),
            engine=EngineSettings(
                id=name if is_engine else "",
                address=f"inproc://{name}",
                events_address=f"inproc://{name}/events",
                replay_address=f"inproc://{name}/replay",
                labels=list(labels),
                cluster=shape.clusters[number] if is_engine and number < len(shape.clusters) else "",
                max_num_seqs=shape.max_num_seqs,
                max_num_batched_tokens=shape.max_num_batched_tokens,
                max_waiting=shape.max_waiting,
                max_model_len=shape.max_model_len,
                drain_s=shape.drain_s,
            ),
            kvcache=KvCacheSettings(
                block_size=shape.block_size,
                num_blocks=shape.num_blocks,
                grant_slots=shape.grant_slots,
                lease_s=shape.lease_s,
                checksums=True,
            ),
            index=IndexSettings(address=self.address(INDEX), max_mb=64),
            router=RouterSettings(
                id="" if is_engine else name,
                address=self.address(name),
                default_strategy="auto",
                # As small as the prompts: every strategy shall do all that it can do.
                strategies={
                    **({name: {"codec": shape.codec} for name in WITH_CODEC} if shape.codec else {}),
                    "auto": {"threshold": 8, "tau": 64},
                    "balanced_adaptive": {"min_share": 4},
                    "conditional": {"policy": "isl_or_load", "max_tokens": 24, "prefill_busy": 16},
                    "elastic_roles": {"period_s": 0.2, "ttft_s": 0.1, "drain_s": 2.0},
                    "hedged": {"after_s": 0.02},
                    "kv_cost": {"temperature": 0.5},
                    "min_ttft": {"balance": 1.0},
                    "prfaas": {"threshold": 16, "period_s": 0.1, "codec": shape.codec},
                    "priority": {"places": 2},
                    "replicate_hot": {"depth": 2, "hot": 1, "period_s": 0.2},
                    "tenant_share": {"by": "user", "share": 0.25, "places": 4},
                    "thirds": {"least": 4},
                },
                max_requests=shape.max_requests,
                deadline_s=60.0,
                call_timeout_s=shape.call_timeout_s,
                check_interval_s=shape.check_interval_s,
                index_max_mb=64,
            ),
        )

    # --- what there is -----------------------------------------------------------------------------

    def numerics(self, engine: str) -> Numerics:
        """The class of the engine of that name."""
        given = self.shape.numerics
        return given[self.engines.index(engine)] if given else HASH

    def mark(self, numerics: Numerics) -> int:
        """The class's bit in the rows; 0 where they have none."""
        names = sorted({each.name for each in self.shape.numerics})
        return 1 << names.index(numerics.name) if names else 0

    def living(self, names: list[str]) -> list[Any]:
        """Services of the seats that are alive."""
        return [self.seats[name].service for name in names if self.seats[name].is_alive]

    def all_gateways(self) -> list[SimGateway]:
        present = [seat.service for name in self.gateways if (seat := self.seats[name]).service is not None]
        return [*self.past, *present]


async def until(holds: Callable[[], bool], timeout_s: float, look_s: float = LOOK_S) -> None:
    """Let virtual time pass until it holds, or is over."""
    waited_s = 0.0
    while waited_s < timeout_s and not holds():
        await asyncio.sleep(look_s)
        waited_s += look_s
