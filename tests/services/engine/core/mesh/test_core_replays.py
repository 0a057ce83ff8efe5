"""Cores over runners that replay: if no layer is sent or awaited, ``on_layer`` comes when all is computed."""

from __future__ import annotations

import threading
from collections.abc import Callable

from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.heap.local import MemoryHeap
from microserve.kvcache.layout import KvLayout
from microserve.services.engine.core.batch import Batch, Runner, StepResult
from microserve.services.simulation.engine.hash_runner import HashRunner
from tests.support.engine.core_mesh import VOCAB, Mesh, expect, generate, grant_for, prompt_of, receive, send

TIMEOUT_S = 30.0


class ReplayingRunner(HashRunner):
    num_replays = 0

    def execute(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult:
        if batch.is_layerwise:
            return super().execute(batch, on_layer)
        self.num_replays += 1
        result = super().execute(batch)
        for layer in range(self._layout.num_layers):
            if on_layer is not None:
                on_layer(layer)
        return result


class ReplayingMesh(Mesh):
    def equip(self, layout: KvLayout, incarnation: int, num_slots: int) -> tuple[Heap, Runner, int | None]:
        heap = MemoryHeap(layout, incarnation=incarnation, registry=self.registry, num_slots=num_slots)
        return heap, ReplayingRunner(heap.data, layout, vocab_size=VOCAB), None


def test_steps_that_nobody_waits_for_are_replayed_and_count_as_progress() -> None:
    mesh = ReplayingMesh()
    prompt = prompt_of(15)
    generate(mesh.a, "r", prompt)
    mesh.run()

    assert mesh.a.tokens["r"] == expect(prompt)
    assert isinstance(mesh.a.runner, ReplayingRunner)
    assert mesh.a.runner.num_replays == mesh.a.core.stepper.num_steps
    assert mesh.a.core.progress == mesh.a.core.stepper.num_steps * mesh.a.core.layout.num_layers
    mesh.close()


def test_a_step_whose_layers_are_sent_or_awaited_is_not_replayed() -> None:
    """The second layer is put when the receiver's step waits for it, which has seen only the first."""
    mesh = ReplayingMesh()
    prompt = prompt_of(15)
    granted = grant_for(mesh.b, "r", prompt, 9)
    receive(mesh.b, "r", granted, 9)
    send(mesh.a, "r", prompt, granted, 0, 9)
    first_is_put, others_may_follow = threading.Event(), threading.Event()
    put_layers: list[int] = []
    execute = mesh.a.runner.execute

    def slowly(batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult:
        def hooked(layer: int) -> None:
            if layer == 1:
                first_is_put.set()
                assert others_may_follow.wait(TIMEOUT_S)
            put_layers.append(layer)
            if on_layer is not None:
                on_layer(layer)

        return execute(batch, hooked)

    mesh.a.runner.execute = slowly  # type: ignore[method-assign]
    sender = threading.Thread(target=mesh.a.step)
    sender.start()

    def go_on() -> None:
        assert put_layers == [0]
        others_may_follow.set()
        sender.join(TIMEOUT_S)

    try:
        assert first_is_put.wait(TIMEOUT_S)
        mesh.arrived = go_on
        assert mesh.b.step()
    finally:
        others_may_follow.set()
        sender.join(TIMEOUT_S)
    assert mesh.arrived is None
    mesh.run()

    assert mesh.b.core.state.counters["early_starts"] == 1
    assert mesh.b.core.state.counters["early_starts_put_back"] == 0
    assert mesh.b.tokens["r"] == expect(prompt)
    assert isinstance(mesh.a.runner, ReplayingRunner)
    assert mesh.a.runner.num_replays == 0
    mesh.close()
