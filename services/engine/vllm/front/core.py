"""The core that the shell asks (services/engine/shell/door.py), with vLLM behind it, all in the event loop.

shell ── actions ──> VllmState ── launch ──> a task for each request at vLLM ── outputs ──> outbox
                         ^
      the connector's notices, words of grants, deadlines: VllmSteps looks at them
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType

import structlog

from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.layout import KvLayout
from microserve.protocol import log
from microserve.protocol.errors import EngineLost, InternalError, MeshError, TransferFailed, error_for
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.engine_info import EARLY_START
from microserve.protocol.messages.kv.kv_events import BlockStored, KVEvent
from microserve.protocol.messages.numerics import Numerics
from microserve.protocol.metrics.readings import Readings
from microserve.services.engine.core.checks import Limits
from microserve.services.engine.core.levels import read_adapters
from microserve.services.engine.core.request.record import Outbox
from microserve.services.engine.kind import EngineKind
from microserve.services.engine.vllm.front.actions import VllmActions
from microserve.services.engine.vllm.front.arrivals import Arrivals
from microserve.services.engine.vllm.front.asyncllm import Llm, Stream
from microserve.services.engine.vllm.front.early import EarlyStarts
from microserve.services.engine.vllm.front.levels import read_levels, read_oldest, read_prefixes
from microserve.services.engine.vllm.front.rates import Occupancy
from microserve.services.engine.vllm.front.receives import Receives
from microserve.services.engine.vllm.front.running import Running
from microserve.services.engine.vllm.front.state import VllmState
from microserve.services.engine.vllm.link import (
    Allocated,
    Arrived,
    Freed,
    NotArrived,
    Received,
    SendFailed,
    Sent,
)
from microserve.services.engine.vllm.link_ends import Front
from microserve.services.engine.vllm.mirror import Mirror

WATCH_S = 0.001
"""Pause between looks at words of grants while somebody waits for their KV."""
LOOK_S = 0.05
"""... while there is a request or a grant: for leases, deadlines, and whether vLLM is alive."""
REST_S = 0.5
"""... of an idle engine."""

_logger = structlog.get_logger()


class _NoLock(AbstractContextManager[bool]):
    """One thread does everything here."""

    def __enter__(self) -> bool:
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class VllmCore:
    def __init__(
        self,
        llm: Llm,
        front: Front,
        heap: Heap,
        mirror: Mirror,
        *,
        engine_id: str,
        incarnation: int,
        kind: EngineKind,
        numerics: Numerics,
        limits: Limits,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        lease_s: float,
        checksums: bool,
        kernels: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``heap``: a view of the worker's, whose layout is vLLM's."""
        self.engine_id, self.incarnation, self.model = engine_id, incarnation, heap.layout.model
        self.kind, self.numerics, self.kernels, self.clock = kind, numerics, kernels, clock
        self.layout: KvLayout = heap.layout
        self.lock: AbstractContextManager[bool] = _NoLock()
        self.state = VllmState(limits, numerics, self._launch)
        self.receives = Receives(
            self.state,
            front.page,
            heap,
            engine_id=engine_id,
            incarnation=incarnation,
            lease_s=lease_s,
            checksums=checksums,
        )
        self.receives.is_told = mirror.holds
        self.early = EarlyStarts(
            self.state,
            self.receives,
            front.page,
            num_layers=heap.layout.num_layers,
            block_size=heap.layout.block_size,
            max_num_seqs=max_num_seqs,
        )
        self.arrivals = Arrivals(
            self.state, self.receives, heap.layout.num_layers, self.early if EARLY_START in kind.can else None
        )
        self.actions = VllmActions(self.state, self.receives, heap.layout, max_num_seqs=max_num_seqs)
        self.llm = llm
        self.front = front
        self.mirror = mirror
        self._heap = heap
        self._max_num_seqs, self._max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.occupancy = Occupancy()
        self._tasks: set[asyncio.Task[None]] = set()
        self.on_output: Callable[[], None] = lambda: None
        self.on_lost: Callable[[], None] = lambda: None
        """vLLM is dead."""
        self._woken = asyncio.Event()

    # --- what the shell asks -------------------------------------------------------------------------

    @property
    def progress(self) -> int:
        progress = self.front.page.progress()
        return progress.steps + progress.layers

    @property
    def is_busy(self) -> bool:
        """vLLM steps while it has a request; without one it does not."""
        return bool(self.state.live)

    @property
    def has_output(self) -> bool:
        outbox = self.state.outbox
        return bool(outbox.replies or outbox.deltas or self.mirror.has_events)

    def wake(self) -> None:
        self._woken.set()

    def take_output(self) -> tuple[Outbox, list[KVEvent]]:
        return self.state.outbox.take(), self.mirror.take_events()

    def cached_blocks(self) -> Sequence[BlockStored]:
        return self.mirror.snapshot()

    def load(self) -> wire.EngineLoad:
        state, rates, now = self.state, self.state.rates, self.clock()
        self._look_at_time()
        occupancy, grants = self.occupancy, self.receives.grants.counts(now)
        steps, layers, free_blocks, _, _ = self.front.page.progress()
        num_blocks = self.state.limits.num_blocks
        # Without a request vLLM does not step, and what it said last is of before the end of the last one.
        free = free_blocks if state.may_expire_soon else num_blocks
        held = [each for each in state.live if not each.is_parked]
        queued = [each for each in held if each.first_token_at is None and each not in self.receives.waiting]
        running = min(len(held), self._max_num_seqs)
        return wire.EngineLoad(
            progress=steps + layers,
            num_steps=steps,
            num_running=running,
            num_waiting=len(held) - running,
            num_grants=self.receives.num_waiting,
            queued_prefill_tokens=sum(len(each.token_ids) - each.received_tokens for each in queued),
            free_blocks=free,
            cached_blocks=min(free, max(0, self.mirror.num_blocks - (num_blocks - free))),
            quarantined_blocks=self.receives.pool.num_quarantined,
            prefill_tokens_per_s=rates.prefill_tokens_per_s,
            decode_step_s=rates.decode_step_s,
            draining=state.draining,
            max_num_seqs=self._max_num_seqs,
            prefill_rate_age_s=rates.prefill_rate_age_s(now),
            mean_output_tokens=rates.mean_output_tokens,
            max_num_batched_tokens=self._max_num_batched_tokens,
            granted_blocks=min(num_blocks - free, grants.num_live_blocks),
            oldest_lease_s=grants.oldest_open_s,
            decode_share=occupancy.decode.at(now),
            transfer_share=occupancy.transfer.at(now),
            idle_share=occupancy.idle.at(now),
        )

    def _look_at_time(self) -> None:
        self.occupancy.look(self.state.live, self.receives.waiting, self.clock())

    def read(self, readings: Readings) -> None:
        """What it holds and has done, for its metrics."""
        state, now = self.state, self.clock()
        read_levels(readings, self.load(), state.limits.num_blocks, self.receives, now)
        read_oldest(readings, [each.arrived_at for each in state.live if each.first_token_at is None], now)
        read_prefixes(readings, state.tally)
        running = {each.adapter for each in state.live if each.first_token_at is not None}
        waiting = {each.adapter for each in state.live if each.first_token_at is None}
        read_adapters(readings, len(state.limits.adapters), running, waiting)
        state.tally.read(readings, state.counters)

    def close(self) -> None:
        """End vLLM's processes. Their locks go with them: peers see a receiver that is gone."""
        for record in self.state.records:
            self.state.abort(record, self.clock())
        for task in self._tasks:
            task.cancel()
        self.llm.shutdown()
        self._heap.close()
        self.front.close()

    # --- requests at vLLM ----------------------------------------------------------------------------

    def _launch(self, running: Running) -> None:
        self._spawn(self._follow(running))

    def _spawn(self, work: object) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, running: Running) -> None:
        """From its being given to vLLM to its last output."""
        state = self.state
        try:
            stream = await self.llm.add(running)
        except EngineLost:
            self.on_lost()
            return
        except MeshError as error:
            self.actions.refused(running, error, self.clock())
            self.on_output()
            return
        running.cancel = lambda: self._spawn(self._abort(stream))
        if running.is_over:
            await self._abort(stream)
        state.accepted(running)
        self._look_at_time()
        self.on_output()
        try:
            while True:
                output = await stream.next()
                if output.finish:  # vLLM has done with it: there is nothing to take away
                    running.cancel = lambda: None
                state.take_output(running, output, self.clock())
                self._look_at_time()
                self.on_output()
                if output.finish:
                    break
        except EngineLost:
            self.on_lost()
        except Exception:  # whoever waits for the stream is told
            _logger.exception(log.TASK_FAILED, task="what vLLM says of a request")
            state.fail(running, InternalError("see the engine's log"), self.clock())
            self.on_output()

    async def _abort(self, stream: Stream) -> None:
        try:
            await stream.abort()
        except Exception:  # it is dead: somebody will have noticed
            _logger.warning(log.TASK_FAILED, task="abort at vLLM", exc_info=True)

    # --- what the connector tells, and time ----------------------------------------------------------

    def read_notices(self) -> None:
        now = self.clock()
        for notice in self.front.read():
            match notice:
                case Allocated():
                    self.receives.allocated(notice, now)
                case Received():
                    self.receives.cached(notice, now)
                case Arrived():
                    self.early.arrived(notice)
                case NotArrived():
                    self.early.not_arrived(notice, now)
                case Freed():
                    self.receives.freed(notice, now)
                case Sent():
                    running = self.actions.send_of(notice.id)
                    if running is not None and running.transfer is not None:
                        running.transfer.nbytes, running.transfer.put_s = notice.nbytes, notice.put_s
                        running.transfer.heap = notice.heap
                        self.state.end_send(running, now)
                    self.actions.forget_send(notice.id)
                case SendFailed():
                    running = self.actions.send_of(notice.id)
                    if running is not None:
                        error = error_for(notice.code, notice.detail) if notice.code else None
                        self.state.fail(running, error or TransferFailed(notice.detail), now)
                    self.actions.forget_send(notice.id)
                case _:  # said once, before there was a core (service.py)
                    pass
        self.on_output()

    def look(self) -> float:
        """At words of grants, leases, deadlines and vLLM's life; returns when to look again, in seconds."""
        now = self.clock()
        if self.llm.is_dead:
            self.on_lost()
            return REST_S
        self.arrivals.poll(now)
        self.state.expire(now)
        self.on_output()
        if self.arrivals.is_watching:
            return WATCH_S
        return LOOK_S if self.state.may_expire_soon or self.state.awaited else REST_S

    async def until_woken(self, timeout_s: float) -> None:
        """Sleep; a message or a notice may shorten it."""
        if timeout_s <= WATCH_S:
            await asyncio.sleep(timeout_s)
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._woken.wait()
        except TimeoutError:
            pass
        self._woken.clear()


class VllmSteps:
    """What runs a :class:`VllmCore`: vLLM steps by itself, and this looks at what that brings."""

    def __init__(self, core: VllmCore, on_output: Callable[[], None], on_crash: Callable[[], None]) -> None:
        self._core = core
        self._loop = asyncio.get_running_loop()
        self._on_crash = on_crash
        self._task: asyncio.Task[None] | None = None
        self._is_lost = False
        core.on_output = on_output
        core.on_lost = self._lost

    def start(self) -> None:
        for descriptor in self._core.front.readable:
            self._loop.add_reader(descriptor, self._on_notices)
        self._task = self._loop.create_task(self._run())

    def stop(self, timeout_s: float) -> bool:
        if self._task is not None:
            self._task.cancel()
        for descriptor in self._core.front.readable:
            self._loop.remove_reader(descriptor)
        return True

    def _on_notices(self) -> None:
        try:
            self._core.read_notices()
        except Exception:
            self._crash()
        self._core.wake()

    async def _run(self) -> None:
        try:
            while True:
                await self._core.until_woken(self._core.look())
        except asyncio.CancelledError:
            raise
        except BaseException:
            self._crash()

    def _crash(self) -> None:
        # The state may be damaged: nothing may be served from it.
        _logger.exception(log.STEP_FAILED)
        self._on_crash()

    def _lost(self) -> None:
        if not self._is_lost:
            self._is_lost = True
            _logger.error(log.STEP_FAILED, detail="one of vLLM's processes has ended")
            self._on_crash()
