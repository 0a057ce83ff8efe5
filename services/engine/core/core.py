"""The engine without its sockets: state, actions and steps behind one lock.

The I/O thread calls the actions (quick, between or during steps); the step thread takes steps, executes them
without the lock and books the results. So a ``PrepRecv`` is answered while a long prefill computes.
Nothing here knows ZeroMQ or asyncio; ``Runner`` may be the real model or a simulated one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Protocol

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.grant.table import GrantTable
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.prefix.cache import PrefixCache
from microserve.protocol.errors import InternalError, MeshError, TransferFailed
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.engine_load import MAX_LINKS_TOLD
from microserve.protocol.messages.kv.kv_events import BlockStored, KVEvent
from microserve.protocol.messages.numerics import fault_of_numerics
from microserve.protocol.metrics.readings import Readings
from microserve.services.engine.core.actions import Actions
from microserve.services.engine.core.batch import Runner, StepResult, constrain
from microserve.services.engine.core.checks import Limits
from microserve.services.engine.core.claims import Claims, unsendable
from microserve.services.engine.core.coding.choice import CodecOptions
from microserve.services.engine.core.coding.outgoing import Outgoing
from microserve.services.engine.core.coding.stage import CodecStage
from microserve.services.engine.core.levels import read_levels, read_shares
from microserve.services.engine.core.memory import KvMemory
from microserve.services.engine.core.peers import Peers
from microserve.services.engine.core.request.record import Outbox
from microserve.services.engine.core.request.sequence import Sequence
from microserve.services.engine.core.scheduler import Scheduler, Step
from microserve.services.engine.core.state import PURGE_INTERVAL_S, Clock, EngineState
from microserve.services.engine.core.stepper import Stepper
from microserve.services.engine.guidance.guide import Guides
from microserve.services.engine.kind import native_kind

ARRIVAL_POLL_S = 0.001
"""Pause between looks at arrival counters while nothing else is to be done."""
EARLY_POLL_S = 0.0002
"""Pause between looks at an arrival counter while a step waits for a layer."""
EARLY_LOOKS_A_PROBE = 50
"""Looks between two probes for a writer that failed or died."""
SCORED_LOGITS_NBYTES = 1 << 27
"""Most memory for logits that a step computes for prompts' sake: all of a long prompt's would take 20 GB."""


class EarlyStartEnded(Exception):
    """A step that waits for a layer has something better to do; nothing has failed."""


class Changed(Protocol):
    """A ``threading.Condition``, or what stands for it where one thread plays all."""

    def __enter__(self) -> bool: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...
    def wait(self, timeout: float | None = None) -> bool: ...
    def notify_all(self) -> None: ...


class EngineCore:
    """Owns pool, prefix cache, grants and queues of one engine; frees all of them in ``close``."""

    def __init__(
        self,
        *,
        engine_id: str,
        incarnation: int,
        model: str,
        heap: Heap,
        runner: Runner,
        limits: Limits,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        lease_s: float,
        checksums: bool,
        compute_stream: int | None = None,
        clock: Clock = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
        changed: Changed | None = None,
        kernels: str = "",
        guides: Guides | None = None,
        codecs: CodecOptions | None = None,
    ) -> None:
        """``compute_stream``: the CUDA stream in which ``runner`` computes KV; None where KV stands in the
        heap when ``on_layer`` is called. ``clock``: the only one that leases, deadlines, sessions and the
        drain are kept by, the shell's too; two clocks need not start at the same zero. ``guides``: None for
        an engine that constrains no output. ``codecs``: None for one that sends and takes KV as it is.

        Raises :class:`InternalError` for a runner of a class that cannot be one, and :class:`ConfigError` for
        a library of codecs that is of another model."""
        self.numerics = runner.numerics
        self.kernels = kernels
        """What computes, in a word for people."""
        is_hybrid = bool(heap.layout.num_state_blocks)
        self.kind = native_kind(has_guides=guides is not None, is_hybrid=is_hybrid)
        if fault := fault_of_numerics(self.numerics):
            raise InternalError(fault)
        self.engine_id, self.incarnation, self.model = engine_id, incarnation, model
        layout = self.layout = heap.layout
        self._codecs = CodecStage(
            *(heap, codecs),
            on_change=self._wake_up,
            clock=clock,
            seed=incarnation,
            chunk_tokens=max_num_batched_tokens,
        )
        pool = BlockPool(layout.num_blocks, heap.back)
        cache = PrefixCache(pool, layout.block_size, model, revision=layout.revision)
        grants = GrantTable(
            heap,
            pool,
            engine_id=engine_id,
            incarnation=incarnation,
            lease_s=lease_s,
            verify_checksums=checksums,
            numerics=self.numerics.name,
            decoder=self._codecs.decoder,
        )
        self.memory = KvMemory(pool, cache, grants, self.numerics)
        scheduler = Scheduler(
            self.memory,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_scored=max(1, SCORED_LOGITS_NBYTES // (4 * limits.vocab_size)),
            eos_token_ids=limits.eos_token_ids,
            on_preempt=self._count_preemption,
        )
        self._peers = Peers(heap, clock)
        self._claims = Claims(heap, self._peers, checksums=checksums)
        self.state = EngineState(
            *(self.memory, scheduler, limits, guides, self._claims.begin, self._wake_up),
            outgoing=self._outgoing,
            on_put=self._codecs.ended,
        )
        self.actions = Actions(self.state)
        self.stepper = Stepper(self.state, layout.num_layers)
        self.progress = 0
        """Layers computed or sent since start; a busy engine's progress must grow."""
        self._changed: Changed = changed or threading.Condition()
        self._heap = heap
        self._runner = runner
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self.clock = clock
        """What every ``now`` that is handed to ``actions`` and ``state`` is read from."""
        self._pause = pause
        self._compute_stream = compute_stream
        self._closed = False
        self._woken = False

    def _count_preemption(self, sequence: Sequence) -> None:
        self.state.count("preemptions")
        if sequence.is_send:
            self.state.count("sends_preempted")

    @property
    def lock(self) -> AbstractContextManager[bool]:
        """Hold it around every call of ``actions`` and ``state``; ``wake`` afterwards."""
        return self._changed

    def wake(self) -> None:
        """There may be something to run. With the lock held."""
        self._woken = True
        self._changed.notify_all()

    def _wake_up(self) -> None:
        """From a thread that holds no lock."""
        with self._changed:
            self.wake()

    def wait_for_work(self, timeout_s: float) -> None:
        """Sleep until woken; for ``timeout_s`` at most where time may bring something (a lease, a deadline, a
        lane that is let go); short while KV is on its way, since its arrival wakes nobody."""
        with self._changed:
            if self._closed or self._woken:  # woken between the last look and now
                return
            if self.state.receiving or self.state.committing or self.memory.is_departing:
                self._changed.wait(ARRIVAL_POLL_S)
            elif self.state.may_expire_soon:
                self._changed.wait(timeout_s)
            else:
                self._changed.wait(PURGE_INTERVAL_S if self.state.must_purge else self._peers.look_s)

    # --- steps -------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Run one step in the calling thread; False if there was nothing to run."""
        with self._changed:
            self._woken = False
            self._peers.poll()
            self._codecs.poll()
            self.memory.free_drained()
            step = self.stepper.next_step(self.clock())
        if step is None:
            return False
        try:
            result = self._execute(step)
        except EarlyStartEnded:
            with self._changed:
                self.stepper.put_back(step)
            return True
        except MeshError as error:
            with self._changed:
                self.stepper.fail(step, error, self.clock())
            return True
        with self._changed:
            self.stepper.complete(step, result, self.clock())
        return True

    def _execute(self, step: Step) -> StepResult:
        def on_layer(layer: int) -> None:
            self.progress += 1
            for share in step.sends:
                self._put(share.sequence, layer, share.lo, share.hi)
            if step.early is not None:
                self._await_layer(step.early, layer)

        if step.batch.chunks:
            step.batch.is_layerwise = bool(step.sends) or step.early is not None
            failed = constrain(step.batch)
            result = self._runner.execute(step.batch, on_layer)
            for place, sampled in failed.items():
                result.sampled[place] = sampled
            return result
        for layer in range(self._heap.layout.num_layers):
            on_layer(layer)
        return StepResult([])

    def _put(self, sequence: Sequence, layer: int, lo: int, hi: int) -> None:
        """Send one layer of one sequence. A receiver's refusal ends that send, never the step."""
        transfer = sequence.transfer
        if transfer is None or transfer.error is not None or sequence.doomed is not None:
            return
        started = self.clock()
        try:
            if transfer.writer is None:
                self._claims.take(transfer)
            if self._compute_stream is not None and transfer.peer is not None:
                transfer.peer.follow(self._compute_stream)
            transfer.is_put = True
            if transfer.writer is not None:
                put = transfer.writer.put_layer
                if transfer.outgoing is not None:
                    put = partial(transfer.outgoing.put_layer, transfer.writer)
                transfer.nbytes += put(layer, sequence.blocks, lo, hi, sequence.state_at(hi))
        except MeshError as error:
            transfer.error = error
        except (OSError, MemoryError) as error:
            transfer.error = unsendable(error)
        transfer.put_s += self.clock() - started

    def _outgoing(self, message: wire.RemoteSend, num_tokens: int) -> Outgoing | None:
        return self._codecs.outgoing(message, num_tokens, self._peers.nbytes_per_s(message.grant))

    def _await_layer(self, sequence: Sequence, layer: int) -> None:
        """Hold the step until a layer's KV is in, or until others want to run.

        Raises :class:`TransferFailed` when it cannot come, :class:`EarlyStartEnded` to wait as others do."""
        grants, received = self.memory.grants, sequence.received
        if received is None:
            return
        grant_id = received.grant_id
        num_looks = 0
        while True:
            now = self.clock()
            num_looks += 1
            with self._changed:
                # Where words are a mirror of the device's, nothing arrives unless somebody looks for it.
                self._heap.poll()
                self._codecs.poll()
                if grants.layer_complete(grant_id, layer):
                    break
                if num_looks % EARLY_LOOKS_A_PROBE == 0:
                    reason = grants.poisoned(grant_id)
                    if reason is not None and not grants.layer_complete(grant_id, layer):
                        raise TransferFailed(reason)
            if sequence.doomed is not None:
                raise EarlyStartEnded
            if self.state.scheduler.waiting or self._has_settled(now):
                raise EarlyStartEnded
            if now > sequence.deadline or self._closed:
                raise EarlyStartEnded
            self._pause(EARLY_POLL_S)
        grants.verify(grant_id, layer)

    def _has_settled(self, now: float) -> bool:
        """Somebody's grammar is compiled, or takes too long, or somebody's lane is taken: only the next step
        goes on with it."""
        with self._changed:
            making = [each.guiding for each in self.state.compiling if each.guiding is not None]
            is_claimed = self.state.has_claimed
        return is_claimed or any(guiding.is_done or guiding.is_overdue(now) for guiding in making)

    # --- what the shell reads ----------------------------------------------------------------------

    def take_output(self) -> tuple[Outbox, list[KVEvent]]:
        """Answers, deltas and KV events since the last call, in order. With the lock held."""
        return self.state.outbox.take(), self.memory.cache.take_events()

    @property
    def has_output(self) -> bool:
        """With the lock held."""
        outbox = self.state.outbox
        return bool(outbox.replies or outbox.deltas or self.memory.cache.has_events)

    def cached_blocks(self) -> list[BlockStored]:
        """Events that build the prefix cache as it is now; take the output first. With the lock held."""
        return self.memory.cache.snapshot()

    def load(self) -> wire.EngineLoad:
        """With the lock held."""
        state, pool, rates, now = self.state, self.memory.pool, self.stepper.rates, self.clock()
        grants = self.memory.grants.counts(now)
        shares = rates.prefill_share(now), rates.decode_share(now), rates.transfer_share(now)
        return wire.EngineLoad(
            progress=self.progress,
            num_steps=self.stepper.num_steps,
            num_running=len(state.scheduler.running),
            num_waiting=state.num_waiting,
            num_grants=self.memory.received.num_waiting,
            queued_prefill_tokens=state.scheduler.queued_prefill_tokens,
            free_blocks=pool.num_free,
            cached_blocks=pool.num_cached,
            quarantined_blocks=pool.num_quarantined,
            prefill_tokens_per_s=rates.prefill_tokens_per_s,
            decode_step_s=rates.decode_step_s,
            draining=state.draining,
            max_num_seqs=self._max_num_seqs,
            prefill_rate_age_s=rates.prefill_rate_age_s(now),
            mean_output_tokens=rates.mean_output_tokens,
            prefill_share=shares[0],
            max_num_batched_tokens=self._max_num_batched_tokens,
            granted_blocks=grants.num_live_blocks,
            oldest_lease_s=grants.oldest_open_s,
            decode_share=shares[1],
            transfer_share=shares[2],
            idle_share=max(0.0, 1.0 - sum(shares)),
            links=[wire.LinkGoodput(*link) for link in self._peers.goodputs(MAX_LINKS_TOLD).items()],
        )

    def read(self, readings: Readings) -> None:
        """What it holds and has done, for its metrics. With the lock held."""
        read_levels(self.state, readings, self.clock())
        read_shares(readings, self.load())
        self.state.tally.read(readings, self.state.counters)

    @property
    def is_busy(self) -> bool:
        """Does a step have something to do? Waiting sequences may rightly wait for KV or for blocks. With the
        lock held."""
        return bool(self.state.scheduler.running)

    def check_integrity(self) -> None:
        """All blocks and sequences accounted for. Raises :class:`InternalError`. With the lock held."""
        self.memory.check_integrity()
        self.state.check_integrity()

    def close(self) -> None:
        """End what is left, let go of peers and heap. After the step thread has ended."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self.state.inflight = []
            for record in self.state.records:
                # Lanes that it holds are let go, and said to be given up.
                self.state.abort(record, self.clock())
        self._claims.close()
        self._codecs.close()
        with self._changed:
            self._peers.close()
            self.memory.free_drained()
        if self.state.guides is not None:
            self.state.guides.close()
        self._heap.close()
