"""Two engine cores on ``cuda_ipc`` heaps over drivers whose streams run late: what a GPU does to an engine.

Steps compute in a stream, so KV is not in the heap when ``on_layer`` is called; puts are in the peers'
streams, which go on a few operations at a time, at random, or not at all while ``is_frozen``. No checksums:
to compute one waits for the whole device.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from microserve.kvcache.heap.gpu.cuda_ipc import CudaIpcHeap
from microserve.kvcache.heap.gpu.device import DeviceHeap
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.layout import KvLayout
from microserve.services.engine.core.batch import Batch, Runner, StepResult
from microserve.services.simulation.engine.hash_runner import HashRunner, _digest
from tests.support.engine.core_mesh import VOCAB, Engine, Mesh
from tests.support.engine.device.host_driver import HostDriver

LATENESS = (0, 0, 1, 3, 10, 30)
"""Operations of a driver's streams between two steps of the mesh."""


class StreamRunner(HashRunner):
    """The hash model as kernels of one stream: written KV and what is read from it come late, in order."""

    def __init__(self, heap: DeviceHeap, driver: HostDriver, drift: Callable[[], None]) -> None:
        data = driver.host_view(heap.data.address, heap.data.nbytes)
        super().__init__(data, heap.layout, vocab_size=VOCAB)
        self._driver = driver
        self._drift = drift
        self.stream = driver.create_stream()

    def execute(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult:
        chunks = batch.chunks
        self.num_tokens += sum(len(chunk.token_ids) for chunk in chunks)
        states = [[_digest(token.to_bytes(4, "little")) for token in chunk.token_ids] for chunk in chunks]
        try:
            for layer in range(self._layout.num_layers):
                self._launch(partial(self._write_all, layer, batch, states))
                if on_layer is not None:
                    on_layer(layer)
                self._drift()
                self._launch(partial(self._attend_all, layer, batch, states))
        finally:
            self._driver.synchronize(self.stream)
        return StepResult([self._sample(c, s[-1]) for c, s in zip(chunks, states, strict=True)])

    def _launch(self, kernel: Callable[[], None]) -> None:
        self._driver.launch(self.stream, kernel)

    def _write_all(self, layer: int, batch: Batch, states: list[list[bytes]]) -> None:
        for chunk, state in zip(batch.chunks, states, strict=True):
            self._write(layer, chunk, state)

    def _attend_all(self, layer: int, batch: Batch, states: list[list[bytes]]) -> None:
        states[:] = [self._attend(layer, c, s) for c, s in zip(batch.chunks, states, strict=True)]


class DeviceMesh(Mesh):
    checksums = False
    lanes_linger = True
    follows = True
    """False plants a bug: puts do not wait for the stream that computes."""

    def __init__(self, *, seed: int = 0, **options: int) -> None:
        self.rng = random.Random(seed)
        self.is_frozen = False
        """No stream but those that compute gets on."""
        self.drivers: list[HostDriver] = []
        super().__init__(**options)

    def equip(self, layout: KvLayout, incarnation: int, num_slots: int) -> tuple[Heap, Runner, int | None]:
        driver = HostDriver()
        heap = CudaIpcHeap(layout, incarnation=incarnation, driver=driver, num_slots=num_slots)
        runner = StreamRunner(heap, driver, self.drift)
        self.drivers.append(driver)
        return heap, runner, runner.stream if self.follows else None

    @property
    def is_writing(self) -> bool:
        return any(driver.busy_streams for driver in self.drivers)

    def drift(self) -> None:
        """Streams get on, some more than others."""
        for driver in self.drivers:
            if not self.is_frozen:
                for _ in range(self.rng.choice(LATENESS)):
                    busy = driver.busy_streams
                    if not busy or not driver.step(self.rng.choice(busy)):
                        break

    def run(self, limit: int = 4000) -> None:
        """Step both until neither can and nothing is on its way (unless the streams are frozen)."""
        for _ in range(limit):
            was_writing = self.is_writing and not self.is_frozen
            self.now += 0.001
            self.drift()
            if not self.a.step() | self.b.step() | was_writing:
                return
        raise AssertionError("the mesh does not come to rest")

    def other_step(self, engine: Engine) -> None:
        super().other_step(engine)
        self.drift()
