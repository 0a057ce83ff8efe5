"""Router, engines and index in one loop over real sockets; messages between router and engines get lost.

The engines are the real shell and core on memory heaps, with the runner whose tokens prove what it read.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from microserve.kvcache.heap.local import MemoryHeap, MemoryRegistry
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.settings.engine import EngineSettings
from microserve.protocol.settings.settings import BusSettings, IndexSettings, RouterSettings, Settings
from microserve.services.engine.core.checks import Limits
from microserve.services.engine.core.core import EngineCore
from microserve.services.engine.shell.shell import EngineShell
from microserve.services.engine.step_thread import StepThread
from microserve.services.index.service import IndexService
from microserve.services.router.service import Router
from microserve.services.simulation.engine.hash_runner import HashRunner, expected_tokens, hash_layout
from tests.support.bus.gateway_peer import GatewayPeer
from tests.support.bus.lossy_bus import LossyBus
from tests.support.router.router_world import eventually

ANY = "tcp://127.0.0.1:0"
INTERVAL_S = 0.05
LIVENESS = 40
"""Silence is so long that no request may wait for it and still end in time."""
VOCAB = 500


class LossyMesh:
    def __init__(self, *engine_ids: str) -> None:
        self._plain = ZmqBus(linger_s=0.05)
        self._bus = ZmqBus(linger_s=0.05)
        self._tasks: list[asyncio.Task[None]] = []
        bus_settings = BusSettings(heartbeat_interval_s=INTERVAL_S, liveness=LIVENESS, linger_s=0.05)
        self._index = IndexService(
            self._plain, address=ANY, settings=bus_settings, max_nbytes=64 << 20, incarnation=7
        )
        index_address = self._index.address
        self.settings = Settings(
            bus=bus_settings,
            index=IndexSettings(address=index_address),
            engine=EngineSettings(drain_s=0.0),
            router=RouterSettings(address=ANY, index_max_mb=1),
        ).check()
        self.from_engines = LossyBus(self._bus)
        self.to_gateways = LossyBus(self._bus, clients=lambda address: False)
        self.from_gateways = LossyBus(self._plain)
        self.to_engines = LossyBus(
            self.to_gateways, clients=lambda address: address != index_address, servers=False
        )
        registry = MemoryRegistry()
        self.cores = {
            engine_id: _core(engine_id, number, registry) for number, engine_id in enumerate(engine_ids, 1)
        }
        self._engines = [
            EngineShell(self.settings, self.from_engines, Lifecycle(), core, partial(StepThread, core))
            for core in self.cores.values()
        ]
        self.router = Router(self.settings, self.to_engines, seed=1)
        self._running = [
            *(engine.run() for engine in self._engines),
            self.router.run(Lifecycle()),
            self._tick(),
        ]
        self.gateway = GatewayPeer(self._plain, self.router.address)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            self._index.tick()

    def start(self) -> None:
        self._tasks = [asyncio.create_task(main) for main in self._running]

    async def joined(self) -> None:
        """Until the router has every engine."""
        await eventually(lambda: len(self.router.registry.joined()) == len(self.cores), "all joined")

    async def at_rest(self) -> None:
        """Until nobody holds or waits for anything."""
        await self.joined()
        await eventually(lambda: len(self.router.serving) == 0, "no live request")
        assert self.router.serving.book.is_zero
        for core in self.cores.values():
            await eventually(lambda core=core: _is_clean(core), f"{core.engine_id} holds nothing")  # type: ignore[misc]
        for connection in self.router.registry.joined():
            await eventually(lambda c=connection: c.is_idle and not c.has_waiters, "nobody waits")  # type: ignore[misc]

    async def stop(self) -> None:
        for task in reversed(self._tasks):
            task.cancel()
            await asyncio.wait([task])
        self.gateway.close()
        for engine in self._engines:
            engine.close()
        self._index.close()
        self._bus.close()
        self._plain.close()
        for task in self._tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
        gc.collect(1)


def _is_clean(core: EngineCore) -> bool:
    with core.lock:
        pool = core.memory.pool
        return not (core.state.num_requests or pool.num_used or pool.num_quarantined)


def _core(engine_id: str, incarnation: int, registry: MemoryRegistry) -> EngineCore:
    num_blocks = 64
    layout = hash_layout(num_blocks=num_blocks)
    heap = MemoryHeap(layout, incarnation=incarnation, registry=registry, num_slots=8)
    return EngineCore(
        engine_id=engine_id,
        incarnation=incarnation,
        model="hash",
        heap=heap,
        runner=HashRunner(heap.data, layout, vocab_size=VOCAB),
        limits=Limits(200, VOCAB, num_blocks, 32, frozenset({0})),
        max_num_seqs=8,
        max_num_batched_tokens=16,
        lease_s=1.0,
        checksums=True,
    )


@asynccontextmanager
async def lossy_mesh(*engine_ids: str) -> AsyncIterator[LossyMesh]:
    """Started, not yet joined. At the end everything is closed."""
    mesh = LossyMesh(*engine_ids)
    mesh.start()
    try:
        yield mesh
    finally:
        await mesh.stop()


def oracle(prompt: Sequence[int], params: SamplingParams) -> list[int]:
    return expected_tokens(list(prompt), params, vocab_size=VOCAB)
