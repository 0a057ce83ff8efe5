"""One engine's shell: a core, its sockets and its place in the index, from start to a clean end.

Heartbeats come from the event loop but carry the step thread's progress, so a stuck step is seen by everyone
although the process lives. Knows no model: the core, what runs its steps and the clock are handed in, so the
simulated mesh runs this very shell.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import structlog

from microserve.protocol import log
from microserve.protocol.bus.address import announced
from microserve.protocol.bus.transport import Bus
from microserve.protocol.messages.engine import EngineInfo, EngineLoad
from microserve.protocol.metrics.readings import Readings
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.process.pace import Pace
from microserve.protocol.process.surviving import surviving
from microserve.protocol.process.tick import at_rest, between_signs, until_tick
from microserve.protocol.settings.settings import Settings
from microserve.protocol.types import WIRE_VERSION
from microserve.services.engine.shell.action_server import ActionServer
from microserve.services.engine.shell.door import Core, MakeSteps
from microserve.services.engine.shell.index_client import IndexClient
from microserve.services.engine.shell.kv_publisher import KvPublisher, topic_of
from microserve.services.engine.shell.metrics import engine_readings

STOP_STEP_S = 10.0
"""A running step gets this long to end at shutdown."""
LEAVE_POLL_S = 0.05
"""Pause between looks whether a draining engine may leave."""

_logger = structlog.get_logger()


class EngineShell:
    """One core, what runs it, its sockets; closes all of them."""

    def __init__(
        self,
        settings: Settings,
        bus: Bus,
        lifecycle: Lifecycle,
        core: Core,
        make_steps: MakeSteps,
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """``make_steps``: called here, once, for what runs ``core``. Raises ``OSError`` for a taken address,
        :class:`ConfigError` for one exposed without keys."""
        self._settings = settings
        self._bus = bus
        self._lifecycle = lifecycle
        self._loop = asyncio.get_running_loop()
        self._crashed = asyncio.Event()
        self._draining = asyncio.Event()
        self._leaves_at = 0.0
        """When a draining engine leaves, whatever is still here."""
        self._core = core
        self._clock = core.clock
        interval_s = self._interval_s = settings.bus.heartbeat_interval_s
        self._rest_interval_s = at_rest(interval_s, settings.bus.liveness)
        self._sign_interval_s = between_signs(interval_s, settings.bus.liveness)
        self._signed_at = float("-inf")
        """When the stream of KV events was last looked at, whether it was quiet."""
        # Routers are calm before they say that they are idle.
        self._pace = Pace(interval_s, settings.bus.liveness, self._is_busy, calm_s=0.0)
        self._publisher = KvPublisher(
            bus,
            events_address=settings.engine.events_address,
            replay_address=settings.engine.replay_address,
            topic=topic_of(settings.engine.events_topic, core.engine_id, core.model),
            open_to_all=settings.engine.events_open,
            strict=settings.engine.events_strict,
            epoch=core.incarnation,
            clock=wall_clock,
        )
        self._server = ActionServer(
            bus,
            settings.engine.address,
            self._core,
            incarnation=core.incarnation,
            interval_s=self._rest_interval_s,
            silence_s=interval_s * settings.bus.liveness,
            publish=self._publisher.publish,
            next_seq=lambda: self._publisher.next_seq,
            on_drain=self.drain,
            stir=self._pace.stir,
            wall_clock=wall_clock,
            strict_events=settings.engine.events_strict,
        )
        limits = core.state.limits
        self._info = EngineInfo(
            engine_id=core.engine_id,
            incarnation=core.incarnation,
            address=self._announced(self._server.address),
            events_address=self._announced(self._publisher.address),
            replay_address=self._announced(self._publisher.replay_address),
            model=core.model,
            labels=settings.engine.labels,
            block_size=core.layout.block_size,
            num_blocks=core.layout.num_blocks,
            num_layers=core.layout.num_layers,
            max_model_len=limits.max_model_len,
            vocab_size=limits.vocab_size,
            eos_token_ids=sorted(limits.eos_token_ids),
            layout_hash=core.layout.layout_hash,
            heap=settings.heap,
            wire_version=WIRE_VERSION,
            curve_key=bus.public_key,
            revision=core.layout.revision,
            numerics=core.numerics,
            events_open=settings.engine.events_open,
            backend=core.kind.backend,
            backend_version=core.kind.backend_version,
            can=[*core.kind.can],
            geometry=core.layout.geometry,
            heaps=settings.heaps,
            split_tokens=core.kind.split_tokens,
            recompute_tokens=core.kind.recompute_tokens,
            adapters=[*limits.adapters],
            cluster=settings.engine.cluster,
        )
        self._index = IndexClient(
            bus,
            settings.index.address,
            info=self._info,
            load=self._locked_load,
            heartbeat_interval_s=interval_s,
            liveness=settings.bus.liveness,
            pace=self._pace,
            on_refused=self._on_refused,
        )
        self._steps = make_steps(self._on_output, self._on_crash)
        self._flush_scheduled = False
        self._stirred = asyncio.Event()
        """Something was said to somebody since the last beat."""
        self._progress, self._progressed_at = 0, self._clock()

    @property
    def num_sessions(self) -> int:
        """Routers, and the index, that the engine keeps something for."""
        return self._server.num_sessions

    def readings(self) -> Readings:
        """What is measured here, as it is now."""
        return engine_readings(self._core, self._info, self._server, self._publisher.counters, self._bus)

    async def run(self) -> None:
        """Serve until cancelled or told to drain; then leave as soon as nothing is left here, within
        ``engine.drain_s``."""
        self._lifecycle.set_health(self._healthy)
        self._server.open(self._info)
        self._steps.start()
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(self._beat()),
                tasks.create_task(self._index.run()),
                tasks.create_task(self._watch_crash()),
            ]
            self._lifecycle.ready(self._info.address, about=self._about, facts=self._facts)
            try:
                await self._leave()
            except asyncio.CancelledError:
                if any(task.done() for task in background):  # the group ends because one of them failed
                    raise
                self.drain()
                await self._leave()
                raise
            for task in background:
                task.cancel()

    def _announced(self, bound: str) -> str:
        return announced(bound, self._settings.engine.advertise, self._settings.index.address)

    @property
    def _about(self) -> str:
        """What computes, by what kernels and with how many threads, who reaches its heap, and its class."""
        numerics, kernels, threads = self._core.numerics, self._core.kernels, self._settings.engine.threads
        kind = "exact" if numerics.is_exact else "not exact"
        said = [kernels, f"{threads} {'thread' if threads == 1 else 'threads'}"] if kernels else []
        what = f"{self._info.backend} {self._info.backend_version}".strip()
        heaps = " ".join(self._info.all_heaps)
        said = [what, *said, *([f"heap {heaps}"] if heaps else [])]
        said += [f"cluster {self._info.cluster}"] if self._info.cluster else []
        return ", ".join(said + ([f"{kind} in {numerics.name}"] if numerics.name else []))

    @property
    def _facts(self) -> dict[str, str]:
        info = self._info
        return {
            "backend": info.backend,
            "backend_version": info.backend_version,
            "heaps": " ".join(info.all_heaps),
            "numerics": info.numerics.name,
            "exact": str(info.numerics.is_exact).lower(),
            "events": info.events_address,
            "replay": info.replay_address,
            "cluster": info.cluster,
        }

    def drain(self) -> None:
        """Take no new work, and tell the routers at once: they move what runs here elsewhere, and :meth:`run`
        ends. A second call changes nothing."""
        if self._draining.is_set():
            return
        with self._core.lock:
            self._core.state.draining = True
            num_requests = self._core.state.num_requests
        self._leaves_at = self._clock() + self._settings.engine.drain_s
        self._draining.set()
        self._pace.stir()
        _logger.info(log.ENGINE_DRAINING, requests=num_requests, drain_s=self._settings.engine.drain_s)
        self._server.beat()

    async def _leave(self) -> None:
        """Wait for the drain, then for its end, and leave the index."""
        await self._draining.wait()
        while self._clock() < self._leaves_at and not self._crashed.is_set():
            with self._core.lock:
                is_drained = self._core.state.is_drained(self._clock())
            if is_drained and not self._server.has_pending:
                break
            await asyncio.sleep(LEAVE_POLL_S)
        self._index.close()
        self._server.beat()
        if self._crashed.is_set():
            # No clean end: ``_watch_crash`` ends all of us, also where this has seen it first.
            await self._loop.create_future()

    async def _beat(self) -> None:
        """Routers go by the loads that they were last told: who does anything tells it every interval."""
        while True:
            next_s = self._pace.next_s
            with surviving("heartbeat"):
                self._server.beat(next_s)
            with surviving("heartbeat of KV events"):
                self._sign_events()
            if next_s:  # whoever wakes us waits for a word
                await self._pace.tick(next_s, self._rest_interval_s)
                continue
            with self._core.lock:
                is_at_rest = not (self._stirred.is_set() or self._core.state.may_expire_soon)
            self._stirred.clear()
            left_s = until_tick(self._loop.time(), self._rest_interval_s)
            if is_at_rest:
                began = self._loop.time()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left_s):
                        await self._stirred.wait()
                if not self._stirred.is_set():
                    continue
                left_s -= self._loop.time() - began
            await asyncio.sleep(min(left_s, until_tick(self._loop.time(), self._interval_s)))

    def _sign_events(self) -> None:
        """A quiet stream says that it is, lest a loss stay unseen: with the last beat before it must."""
        now = self._loop.time()
        if now - self._signed_at >= self._sign_interval_s - self._rest_interval_s:
            self._signed_at = now
            self._publisher.beat()

    def _is_busy(self) -> bool:
        with self._core.lock:
            may_change = self._core.state.may_expire_soon
        return may_change or self._stirred.is_set() or not self._server.are_idle or self._draining.is_set()

    def _healthy(self) -> bool:
        """Steps advance, or there is nothing to step."""
        with self._core.lock:
            progress, busy = self._core.progress, self._core.is_busy
        now = self._clock()
        if progress != self._progress or not busy:
            self._progress, self._progressed_at = progress, now
        return not self._crashed.is_set() and now - self._progressed_at < self._settings.bus.stuck_s

    async def _watch_crash(self) -> None:
        await self._crashed.wait()
        raise RuntimeError("the step thread has ended; see step.failed")

    def _on_refused(self, reason: str) -> None:
        """By the index. We stay, and serve whom we serve; nobody new finds us."""
        address = self._server.address
        self._lifecycle.status(f"refused by the index: {reason}" if reason else f"ready at {address}")

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
        self._stirred.set()
        self._pace.stir()
        self._server.flush()

    def _on_crash(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: all of it ends as it is
            self._loop.call_soon_threadsafe(self._crashed.set)

    def close(self) -> None:
        """Stop what runs the core, tell the index, close every socket and the heap."""
        stopped = self._steps.stop(STOP_STEP_S)
        self._index.close()
        self._server.close()
        self._publisher.close()
        if stopped:
            self._core.close()
