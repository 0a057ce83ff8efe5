"""Engines and a mesh that serve a trace in the time that a :class:`Profile` says: no KV is computed.

A *profiled* engine takes the time of its profile. Owns what it puts in the place of model, memory and link.
Scheduler, pools, prefix cache, grants, puts and wire are the engine's own; bytes of a small layout really
move, and the link charges for those of the profile. A token is drawn from nothing, so nothing here can tell a
wrong one: that is the fault campaign's business.

One simulated token stands for ``scale`` real ones (1: exact). A step with decodes is ``scale`` forward
passes, each with its share of the step's prefill; a step without any fills as few passes as it can.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from microserve.kvcache.heap.heap import Copies
from microserve.kvcache.heap.local import MemoryHeap, MemoryPeerHeap, MemoryRegistry
from microserve.kvcache.heap.mapped import require_same_kv
from microserve.protocol.messages.kv.grant import HeapAddress
from microserve.protocol.messages.numerics import UNKNOWN
from microserve.protocol.settings.settings import RouterSettings, Settings
from microserve.services.engine.core.batch import Batch, Chunk, Runner, Sampled, StepResult
from microserve.services.engine.step_thread import IDLE_WAIT_S
from microserve.services.router.oversight.overseer import Overseer
from microserve.services.simulation.bus import SimBus
from microserve.services.simulation.engine.engine import SimEngine
from microserve.services.simulation.engine.hash_runner import ROW_NBYTES, hash_layout
from microserve.services.simulation.engine.steps import Pacer
from microserve.services.simulation.engine.witness import Witness
from microserve.services.simulation.journal import Journal
from microserve.services.simulation.load.timing import Profile
from microserve.services.simulation.load.work import CountedRunner, Work
from microserve.services.simulation.loop import Process, VirtualLoop
from microserve.services.simulation.mesh import Shape, SimulatedMesh
from microserve.services.simulation.network import CalmNetwork, Network

NUM_LAYERS = 4
"""Of the simulated model; each stands for its share of the real one's. More would cost time and change what
cannot be hidden, the last layer of a put, by little."""
VOCAB_SIZE = 1 << 17
LIVENESS = 120
"""In a calm mesh. Nobody dies or falls silent there, so nobody has to hear often that others have not: what
says that and no more comes twenty times less often than by the product's default. Loads are told as often."""
MAX_UNSEEN_S = 5.0
"""A step that takes longer shows its progress layer by layer, lest its engine be taken for stuck."""


@dataclass
class Hardware:
    """What all profiled engines of one mesh share: their kind, and the links between them."""

    profile: Profile
    scale: int
    num_batched_tokens: int
    """Real tokens in one forward pass."""
    is_calm: bool = True
    """Nobody is going to die or to be slow, and no message to be lost or late."""
    receiving_until: dict[int, float] = field(default_factory=dict)
    """By incarnation, virtual time until which its link is taken."""
    pacers: dict[int, Pacer] = field(default_factory=dict)
    num_prefill_tokens: int = 0
    """Real tokens, over all engines."""
    num_put_nbytes: float = 0.0
    """Bytes of the profile's KV, over all engines."""
    work: defaultdict[str, Work] = field(default_factory=lambda: defaultdict(Work))
    """By engine id."""

    def step_s(self, chunks: list[Chunk]) -> float:
        """Seconds of a step; counts its prefill."""
        decodes = [chunk for chunk in chunks if _is_decode(chunk)]
        prefills = [chunk for chunk in chunks if not _is_decode(chunk)]
        num_tokens = self.scale * sum(len(chunk.token_ids) for chunk in prefills)
        self.num_prefill_tokens += num_tokens
        num_passes = self.scale if decodes else max(1, -(-num_tokens // self.num_batched_tokens))
        return self.profile.step_s(
            [(self.scale * len(chunk.token_ids), self.scale * chunk.start) for chunk in prefills],
            [self.scale * (chunk.start + 1) for chunk in decodes],
            num_passes,
        )


def _is_decode(chunk: Chunk) -> bool:
    return len(chunk.token_ids) == 1 and chunk.sample is not None and bool(chunk.sample.output_token_ids)


class ProfiledRunner:
    """Time passes layer by layer; what a put took meanwhile is hidden behind the next layer, if it can be."""

    numerics = UNKNOWN
    """It computes nothing."""

    def __init__(self, heap: ProfiledHeap, pacer: Pacer, hardware: Hardware) -> None:
        self._heap = heap
        self._pacer = pacer
        self._hardware = hardware

    def execute(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult:
        hardware = self._hardware
        step_s = hardware.step_s(batch.chunks)
        if hardware.is_calm and not batch.is_layerwise and step_s <= MAX_UNSEEN_S:
            # Nobody looks between its layers.
            self._pacer.sleep(step_s)
            if on_layer is not None:
                for layer in range(NUM_LAYERS):
                    on_layer(layer)
            return StepResult([_drawn(chunk) for chunk in batch.chunks])
        layer_s, hidden_s = step_s / NUM_LAYERS, 0.0
        for layer in range(NUM_LAYERS):
            self._pacer.sleep(max(0.0, layer_s - hidden_s))
            put_before_s = self._heap.put_s
            if on_layer is not None:
                on_layer(layer)
            if hardware.profile.overlaps:
                hidden_s = self._heap.put_s - put_before_s
        return StepResult([_drawn(chunk) for chunk in batch.chunks])


def _drawn(chunk: Chunk) -> Sampled | None:
    if chunk.sample is None:
        return None
    return Sampled(len(chunk.sample.output_token_ids), None, [])


class ProfiledHeap(MemoryHeap):
    """A heap whose puts take as long as the link needs."""

    def __init__(
        self,
        settings: Settings,
        *,
        incarnation: int,
        registry: MemoryRegistry,
        hardware: Hardware,
        sleep: Callable[[float], None],
        now: Callable[[], float],
    ) -> None:
        cache = settings.kvcache
        layout = hash_layout(num_blocks=cache.num_blocks, block_size=cache.block_size, num_layers=NUM_LAYERS)
        super().__init__(layout, incarnation=incarnation, registry=registry, num_slots=cache.grant_slots)
        self.hardware = hardware
        self.put_s = 0.0
        """Spent in puts so far, waiting for the receiver's link as well."""
        self._sleep = sleep
        self._now = now

    def attach(self, address: HeapAddress) -> MemoryPeerHeap:
        owner = self._registry._find(address)
        require_same_kv(self.layout, owner.layout)
        return ProfiledPeerHeap(self, owner, self._registry)

    def carry(self, incarnation: int, num_rows: int) -> None:
        """One layer's KV of so many simulated tokens goes over the link to that receiver."""
        hardware, now = self.hardware, self._now()
        num_tokens = hardware.scale * num_rows / NUM_LAYERS
        hardware.num_put_nbytes += num_tokens * hardware.profile.kv_nbytes_per_token
        begin = max(now, hardware.receiving_until.get(incarnation, 0.0))
        hardware.receiving_until[incarnation] = end = begin + hardware.profile.put_s(num_tokens)
        self.put_s += end - now
        self._sleep(end - now)


class ProfiledPeerHeap(MemoryPeerHeap):
    """What is put arrives when it has been carried; a signal wakes its receiver, who need not poll."""

    def __init__(self, writer: ProfiledHeap, owner: MemoryHeap, registry: MemoryRegistry) -> None:
        super().__init__(writer, owner, registry)
        self._mine = writer

    def put(self, copies: Copies, source_shift: int = 0, target_shift: int = 0) -> None:
        self._mine.carry(self.address.incarnation, copies.nbytes // (2 * ROW_NBYTES))
        super().put(copies, source_shift, target_shift)

    def signal(self, word: int, value: int) -> None:
        super().signal(word, value)
        self._wake()

    def let_go(self, slot: int, lane: int) -> None:
        super().let_go(slot, lane)
        self._wake()

    def _wake(self) -> None:
        pacer = self._mine.hardware.pacers.get(self.address.incarnation)
        if pacer is not None:
            pacer.wake()


class ProfiledEngine(SimEngine):
    vocab_size = VOCAB_SIZE

    def __init__(
        self,
        loop: VirtualLoop,
        process: Process,
        settings: Settings,
        bus: SimBus,
        registry: MemoryRegistry,
        witness: Witness,
        *,
        incarnation: int,
        seed: int,
        hardware: Hardware,
    ) -> None:
        self._hardware = hardware
        self._virtual_time = lambda: loop.now
        super().__init__(loop, process, settings, bus, registry, witness, incarnation=incarnation, seed=seed)
        hardware.pacers[incarnation] = self.pacer

    def _equip(
        self, settings: Settings, registry: MemoryRegistry, incarnation: int
    ) -> tuple[MemoryHeap, Runner]:
        heap = ProfiledHeap(
            settings,
            incarnation=incarnation,
            registry=registry,
            hardware=self._hardware,
            sleep=self.pacer.sleep,
            now=self._virtual_time,
        )
        hardware, work = self._hardware, self._hardware.work[settings.engine.id]
        runner = ProfiledRunner(heap, self.pacer, hardware)
        return heap, CountedRunner(runner, work, hardware.scale, self._virtual_time)

    def _pause(self, seconds: float) -> None:
        """A step that waits for a layer is woken by the put's signal, or by a message."""
        self.pacer.wait(IDLE_WAIT_S)


class ProfiledMesh(SimulatedMesh):
    """A mesh of profiled engines, with the product's own settings."""

    def __init__(
        self,
        loop: VirtualLoop,
        seed: int,
        shape: Shape,
        journal: Journal,
        hardware: Hardware,
        router: RouterSettings,
        overseer: Overseer | None = None,
    ) -> None:
        super().__init__(loop, seed, shape, journal, overseer)
        self.hardware = hardware
        self._router = router

    def _make_network(self, rng: random.Random) -> Network:
        return CalmNetwork(self.loop, rng, self.seed)

    def _make_engine(
        self, process: Process, settings: Settings, bus: SimBus, incarnation: int, seed: int
    ) -> SimEngine:
        return ProfiledEngine(
            self.loop,
            process,
            settings,
            bus,
            self.registry,
            self.witness,
            incarnation=incarnation,
            seed=seed,
            hardware=self.hardware,
        )

    def settings(self, name: str) -> Settings:
        settings = super().settings(name)
        router, product = settings.router, Settings()
        liveness = LIVENESS if self.hardware.is_calm else product.bus.liveness
        return msgspec.structs.replace(
            settings,
            bus=msgspec.structs.replace(product.bus, liveness=liveness),
            router=msgspec.structs.replace(self._router, id=router.id, address=router.address),
            kvcache=msgspec.structs.replace(settings.kvcache, checksums=False),
        )
