"""One engine process: model, heap, core, and their sockets, from start to a clean end.

Heartbeats come from the event loop but carry the step thread's progress, so a stuck step is seen by everyone
although the process lives. SIGTERM drains: no new work, running requests finish within ``engine.drain_s``.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from microserve.kvcache.heap.shm import ShmHeap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.actions import EngineInfo, EngineLoad
from microserve.protocol.errors import ConfigError
from microserve.protocol.settings import Settings
from microserve.protocol.transport import Bus
from microserve.protocol.types import WIRE_VERSION
from microserve.services.engine.core import EngineCore
from microserve.services.engine.door import Door
from microserve.services.engine.model import LoadedModel, load_model
from microserve.services.engine.runner import ModelRunner
from microserve.services.engine.state import Limits
from microserve.services.engine.step_loop import StepLoop
from microserve.services.index.client import IndexClient
from microserve.services.index.publisher import KvPublisher
from microserve.services.lifecycle import Lifecycle

STOP_STEP_S = 10.0
"""A running step gets this long to end at shutdown."""


async def run_engine(settings: Settings, bus: Bus, lifecycle: Lifecycle) -> None:
    """Serve until cancelled. Raises :class:`ConfigError` when model or settings cannot work."""
    if not settings.model.path:
        raise ConfigError("model.path is not set", field="model.path")
    if settings.kvcache.heap != "shm":
        raise ConfigError(
            f"kvcache.heap {settings.kvcache.heap!r} is not known; use 'shm'", field="kvcache.heap"
        )
    torch.set_num_threads(settings.engine.threads)
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1, "load") as pool:
        model = await loop.run_in_executor(pool, _load, settings)
    engine = EngineService(settings, bus, lifecycle, model)
    try:
        await engine.run()
    finally:
        engine.close()


def _load(settings: Settings) -> LoadedModel:
    return load_model(
        settings.model.path,
        dtype=settings.model.dtype,
        device=settings.engine.device,
        load_format=settings.model.load_format,
    )


def make_core(settings: Settings, model: LoadedModel, engine_id: str, incarnation: int) -> EngineCore:
    """Heap, runner and core for a loaded model."""
    spec, cache = model.spec, settings.kvcache
    name = settings.model.name or spec.name
    max_model_len = min(settings.engine.max_model_len or spec.max_model_len, spec.max_model_len)
    layout = KvLayout(
        model=name,
        num_layers=spec.num_layers,
        num_blocks=cache.num_blocks,
        block_size=cache.block_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
    )
    heap = ShmHeap(layout, incarnation=incarnation, num_slots=cache.grant_slots)
    return EngineCore(
        engine_id=engine_id,
        incarnation=incarnation,
        model=name,
        heap=heap,
        runner=ModelRunner(model, heap.data, cache.num_blocks, cache.block_size),
        limits=Limits(
            max_model_len=max_model_len,
            vocab_size=spec.vocab_size,
            num_blocks=cache.num_blocks,
            max_waiting=settings.engine.max_waiting,
            eos_token_ids=frozenset(spec.eos_token_ids),
        ),
        max_num_seqs=settings.engine.max_num_seqs,
        max_num_batched_tokens=settings.engine.max_num_batched_tokens,
        lease_s=cache.lease_s,
        checksums=cache.checksums,
    )


class EngineService:
    """The shell around one core."""

    def __init__(self, settings: Settings, bus: Bus, lifecycle: Lifecycle, model: LoadedModel) -> None:
        self._settings = settings
        self._lifecycle = lifecycle
        self._loop = asyncio.get_running_loop()
        self._engine_id = settings.engine.id or f"engine-{secrets.token_hex(4)}"
        self._incarnation = secrets.randbits(62) | 1
        self._crashed = asyncio.Event()
        self._core = make_core(settings, model, self._engine_id, self._incarnation)
        interval_s, clock = settings.bus.heartbeat_interval_s, self._loop.time
        self._publisher = KvPublisher(
            bus,
            events_address=settings.engine.events_address,
            replay_address=settings.engine.replay_address,
            topic=f"kv@{self._engine_id}",
            epoch=self._incarnation,
            clock=time.time,
        )
        self._door = Door(
            bus,
            settings.engine.address,
            self._core,
            incarnation=self._incarnation,
            silence_s=interval_s * settings.bus.liveness,
            clock=clock,
            publish=self._publisher.publish,
            next_seq=lambda: self._publisher.next_seq,
        )
        spec = model.spec
        limits = self._core.state.limits
        self._info = EngineInfo(
            engine_id=self._engine_id,
            incarnation=self._incarnation,
            address=self._door.address,
            events_address=self._publisher.address,
            replay_address=self._publisher.replay_address,
            model=settings.model.name or spec.name,
            labels=settings.engine.labels,
            block_size=settings.kvcache.block_size,
            num_blocks=settings.kvcache.num_blocks,
            num_layers=spec.num_layers,
            max_model_len=limits.max_model_len,
            vocab_size=spec.vocab_size,
            eos_token_ids=sorted(limits.eos_token_ids),
            layout_hash=self._core.layout.layout_hash,
            heap=settings.kvcache.heap,
            wire_version=WIRE_VERSION,
            curve_key=bus.public_key,
        )
        self._index = IndexClient(
            bus,
            settings.index.address,
            info=self._info,
            load=self._locked_load,
            heartbeat_interval_s=interval_s,
            liveness=settings.bus.liveness,
        )
        self._steps = StepLoop(self._core, self._on_output, self._on_crash)
        self._flush_scheduled = False
        self._progress, self._progressed_at = 0, self._loop.time()

    async def run(self) -> None:
        self._lifecycle.set_health(self._healthy)
        self._door.open(self._info)
        self._steps.start()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._beat())
                tasks.create_task(self._index.run())
                tasks.create_task(self._watch_crash())
                self._lifecycle.ready(self._door.address)
        except asyncio.CancelledError:
            await self._drain()
            raise

    async def _drain(self) -> None:
        """Refuse new work and let what runs end, within ``engine.drain_s``."""
        with self._core.lock:
            self._core.state.draining = True
        self._index.close()
        ends_at = self._loop.time() + self._settings.engine.drain_s
        while self._loop.time() < ends_at and not self._crashed.is_set():
            with self._core.lock:
                state = self._core.state
                is_done = not (state.num_requests or state.committing)
            if is_done and not self._door.has_pending:
                break
            self._door.beat()
            await asyncio.sleep(min(0.1, self._settings.bus.heartbeat_interval_s))
        self._door.beat()

    async def _beat(self) -> None:
        while True:
            self._door.beat()
            self._publisher.beat()
            await asyncio.sleep(self._settings.bus.heartbeat_interval_s)

    def _healthy(self) -> bool:
        """Steps advance, or there is nothing to step."""
        with self._core.lock:
            progress, busy = self._core.progress, self._core.is_busy
        now = self._loop.time()
        if progress != self._progress or not busy:
            self._progress, self._progressed_at = progress, now
        return not self._crashed.is_set() and now - self._progressed_at < self._settings.bus.stuck_s

    async def _watch_crash(self) -> None:
        await self._crashed.wait()
        raise RuntimeError("the step thread has ended; see step.failed")

    def _locked_load(self) -> EngineLoad:
        with self._core.lock:
            return self._core.load()

    def _on_output(self) -> None:
        """From the step thread: let the loop send what there is to send."""
        with self._core.lock:
            if self._flush_scheduled or not self._core.has_output:
                return
            self._flush_scheduled = True
        self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        with self._core.lock:
            self._flush_scheduled = False
        self._door.flush()

    def _on_crash(self) -> None:
        self._loop.call_soon_threadsafe(self._crashed.set)

    def close(self) -> None:
        """Stop the step thread, tell the index, close every socket and the heap."""
        stopped = self._steps.stop(STOP_STEP_S)
        self._index.close()
        self._door.close()
        self._publisher.close()
        if stopped:
            self._core.close()
