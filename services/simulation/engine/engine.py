"""One life of a simulated engine: the real shell and core on a heap, a clock and a model of the simulation.

Owns nothing that a real engine has not; what is replaced is named in ``__init__``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from microserve.kvcache.heap.local import MemoryHeap, MemoryRegistry
from microserve.protocol.bus.transport import Bus
from microserve.protocol.messages.numerics import Numerics
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.settings.settings import Settings
from microserve.services.engine.core.batch import Batch, Chunk, Runner, StepResult
from microserve.services.engine.core.checks import Limits
from microserve.services.engine.core.coding.choice import CodecOptions
from microserve.services.engine.core.core import EngineCore
from microserve.services.engine.shell.shell import EngineShell
from microserve.services.simulation.engine.hash_runner import HASH, HashRunner, hash_layout
from microserve.services.simulation.engine.heap import FaultyHeap, WriteFaults
from microserve.services.simulation.engine.marked_runner import MarkedRunner
from microserve.services.simulation.engine.steps import Pacer, VirtualCondition, VirtualSteps
from microserve.services.simulation.engine.toy_guides import ToyGuides
from microserve.services.simulation.engine.witness import Witness
from microserve.services.simulation.loop import Process, VirtualLoop

MODEL = "hash"
VOCAB_SIZE = 500
LAYER_S = 0.004
TOKEN_S = 0.0002
"""A layer takes ``LAYER_S``, and ``TOKEN_S`` more for each token of the step."""
LOOK_S = 0.001
"""An engine that waits for KV sees it within so long, as a real one does by looking all the time."""
MIN_PAUSE_S = 0.002
"""Shortest pause between two looks in a step that waits for a layer, and probes its writer now and then."""


class TimedRunner:
    """The hash model with a price: time passes after a layer's rows are written and before they are sent."""

    def __init__(self, runner: HashRunner, pacer: Pacer) -> None:
        self._runner = runner
        self.numerics = runner.numerics
        self._pacer = pacer

    def execute(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult:
        seconds = LAYER_S + TOKEN_S * sum(len(chunk.token_ids) for chunk in batch.chunks)

        def timed(layer: int) -> None:
            self._pacer.sleep(seconds)
            if on_layer is not None:
                on_layer(layer)

        result = self._runner.execute(batch, timed)
        if batch.is_layerwise:
            # Logits and sampling come behind the last layer: what it sent is there, and its lane is held.
            self._pacer.sleep(LAYER_S)
        return result


class SimEngine:
    """``run`` in the engine's process."""

    vocab_size = VOCAB_SIZE

    def __init__(
        self,
        loop: VirtualLoop,
        process: Process,
        settings: Settings,
        bus: Bus,
        registry: MemoryRegistry,
        witness: Witness,
        *,
        incarnation: int,
        seed: int,
        numerics: Numerics = HASH,
        mark: int = 0,
        width: int = 1,
    ) -> None:
        """``width``: of rows; above 1 engines have codecs. ``numerics``: in which class it computes.
        ``mark``: that class's bit in the rows, in a mesh of several (marked_runner.py); 0: rows are not
        marked."""
        cache = settings.kvcache
        self.numerics, self.mark, self._width = numerics, mark, width
        self.runner: HashRunner | None = None
        """None where another kind of engine computes nothing."""
        self._witness = witness
        self.process = process
        self.pacer = Pacer(loop, process)
        self.faults = WriteFaults(random.Random(seed), self.pacer.sleep)
        heap, runner = self._equip(settings, registry, incarnation)
        self.core = EngineCore(
            engine_id=settings.engine.id,
            incarnation=incarnation,
            model=MODEL,
            heap=heap,
            runner=runner,
            limits=Limits(
                max_model_len=settings.engine.max_model_len,
                vocab_size=self.vocab_size,
                num_blocks=cache.num_blocks,
                max_waiting=settings.engine.max_waiting,
                eos_token_ids=frozenset(),
            ),
            max_num_seqs=settings.engine.max_num_seqs,
            max_num_batched_tokens=settings.engine.max_num_batched_tokens,
            lease_s=cache.lease_s,
            checksums=cache.checksums,
            clock=lambda: process.now,
            pause=self._pause,
            changed=self._make_condition(),
            guides=ToyGuides(self.vocab_size, lambda: process.now),
            codecs=CodecOptions(num_threads=0) if width > 1 else None,
        )
        witness.join(incarnation, self.core.memory.grants)
        self.service: EngineShell | None = None
        self._marks: tuple[int, ...] = ()
        self._settings = settings
        self._bus = bus
        self._loop = loop

    def _equip(
        self, settings: Settings, registry: MemoryRegistry, incarnation: int
    ) -> tuple[MemoryHeap, Runner]:
        """Its memory, and what computes on it."""
        cache = settings.kvcache
        layout = hash_layout(num_blocks=cache.num_blocks, block_size=cache.block_size, width=self._width)
        heap = FaultyHeap(
            layout,
            incarnation=incarnation,
            registry=registry,
            num_slots=cache.grant_slots,
            faults=self.faults,
            witness=self._witness,
            ring=self._ring,
        )
        runner = HashRunner(heap.data, layout, vocab_size=VOCAB_SIZE, numerics=self.numerics)
        if self.mark:
            runner = MarkedRunner(
                *(heap.data, layout),
                vocab_size=VOCAB_SIZE,
                numerics=self.numerics,
                mark=self.mark,
                on_sampled=self._sampled,
            )
        self.runner = runner
        return heap, TimedRunner(runner, self.pacer)

    def _sampled(self, chunk: Chunk, mark: int) -> None:
        """A token of some request has been made from rows of these classes."""
        if chunk.sample is None:
            return
        for sequence in self.core.state.inflight:
            if sequence.sequence_id == chunk.sequence_id:
                self._witness.sampled(sequence.request_id, len(chunk.sample.output_token_ids), mark)

    def foreign_blocks(self) -> list[int]:
        """Blocks of its prefix cache that owe to another class than its own."""
        cache, runner = self.core.memory.cache, self.runner
        if not isinstance(runner, MarkedRunner):
            return []
        return [block for block in cache.blocks if runner.marks_of(block) != self.mark]

    def _pause(self, seconds: float) -> None:
        """Between two looks at a counter: until somebody writes here, or a message comes."""
        self.pacer.wait(max(seconds, MIN_PAUSE_S))

    def _ring(self) -> None:
        """Somebody has written here."""
        self.pacer.wake(self.faults.rng.uniform(0.0, LOOK_S))

    def _make_condition(self) -> VirtualCondition:
        return VirtualCondition(self.pacer)

    @property
    def num_routers(self) -> int:
        """Peers that the engine keeps something for, the index among them."""
        return self.service.num_sessions if self.service is not None else 0

    def has_changed(self) -> bool:
        """Has anything been asked of it, or been done, since the last call?"""
        core = self.core
        marks = (core.progress, core.state.counters.total(), core.memory.pool.num_free)
        changed, self._marks = marks != self._marks, marks
        return changed

    async def run(self) -> None:
        self.service = service = EngineShell(
            self._settings,
            self._bus,
            Lifecycle(),
            self.core,
            partial(VirtualSteps, self.pacer, self.core),
            wall_clock=lambda: self._loop.now,
        )
        try:
            await service.run()
        finally:
            service.close()
