"""One engine service over a real bus, with an index: its steps compute hashes while a gate is open."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

from microserve.kvcache.heap.local import MemoryHeap, MemoryRegistry
from microserve.protocol.bus.codec import INDEX_REPLY, INDEX_REQUEST
from microserve.protocol.bus.curve import CurveKeys
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.messages import index as membership
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.settings.settings import Settings
from microserve.protocol.settings.sources import load_settings
from microserve.services.engine.core.batch import Batch, StepResult
from microserve.services.engine.core.checks import Limits
from microserve.services.engine.core.core import EngineCore
from microserve.services.engine.core.state import Clock
from microserve.services.engine.shell.shell import EngineShell
from microserve.services.engine.step_thread import StepThread
from microserve.services.index.service import run_index
from microserve.services.simulation.engine.hash_runner import HashRunner, hash_layout
from tests.support.router.router_world import eventually

VOCAB = 500
INCARNATION = 5


class Gated(HashRunner):
    """Steps run while the gate is open."""

    gate: threading.Event

    def execute(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult:
        assert self.gate.wait(30)
        return super().execute(batch, on_layer)


class EngineWorld:
    """One engine service, and a watcher of the index."""

    def __init__(
        self, bus: ZmqBus, settings: Settings, clock: Clock, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self.bus, self.settings = bus, settings
        layout = hash_layout(num_blocks=64)
        heap = MemoryHeap(layout, incarnation=INCARNATION, registry=MemoryRegistry(), num_slots=8)
        runner = Gated(heap.data, layout, vocab_size=VOCAB)
        self.gate = runner.gate = threading.Event()
        self.core = EngineCore(
            engine_id="e",
            incarnation=INCARNATION,
            model="hash",
            heap=heap,
            runner=runner,
            limits=Limits(200, VOCAB, 64, 32, frozenset({0})),
            max_num_seqs=8,
            max_num_batched_tokens=64,
            lease_s=5.0,
            checksums=True,
            clock=clock,
        )
        self.lifecycle = Lifecycle()
        self.service = EngineShell(
            settings, bus, self.lifecycle, self.core, partial(StepThread, self.core), wall_clock=wall_clock
        )
        self.task = asyncio.create_task(self._run())
        self.members: list[membership.Member] = []
        self._index = bus.client(settings.index.address, self._take)
        self._watching = asyncio.create_task(self._watch(settings.bus.heartbeat_interval_s))

    async def _watch(self, interval_s: float) -> None:
        while True:
            self._index.send(INDEX_REQUEST.encode(membership.Watch("test")))
            await asyncio.sleep(interval_s)

    async def _run(self) -> None:
        try:
            await self.service.run()
        finally:
            self.gate.set()
            self.service.close()

    def _take(self, frames: list[bytes]) -> None:
        message, _ = INDEX_REPLY.decode(frames)
        if isinstance(message, membership.Members):
            self.members = list(message.members)

    async def ended(self) -> None:
        async with asyncio.timeout(60):
            await asyncio.wait([self.task])
        await eventually(lambda: not self.members, "the engine has left the index")

    async def close(self) -> None:
        self.gate.set()
        if not self.task.done():
            self.task.cancel()
            await asyncio.wait([self.task])
        self._watching.cancel()
        self._index.close()


def make_settings(index_address: str, drain_s: float = 20.0, curve_dir: str = "") -> Settings:
    return load_settings(
        overrides=[
            f"index.address={index_address}",
            "bus.heartbeat_interval_s=0.05",
            "bus.liveness=200",
            f"bus.curve_dir={curve_dir}",
            f"engine.drain_s={drain_s}",
        ]
    )


@asynccontextmanager
async def engine_world(
    *,
    drain_s: float = 20.0,
    curve_dir: str = "",
    clock: Clock = time.monotonic,
    wall_clock: Callable[[], float] = time.time,
) -> AsyncIterator[EngineWorld]:
    bus = ZmqBus(linger_s=0.1, keys=CurveKeys.load(curve_dir) if curve_dir else None)
    lifecycle = Lifecycle()
    index = asyncio.create_task(run_index(make_settings("tcp://127.0.0.1:0"), bus, lifecycle))
    settings = make_settings(await lifecycle.wait_ready(), drain_s, curve_dir)
    world = EngineWorld(bus, settings, clock, wall_clock)
    try:
        await eventually(lambda: world.members, "the engine is a member")
        yield world
    finally:
        await world.close()
        index.cancel()
        await asyncio.wait([index])
        bus.close()
