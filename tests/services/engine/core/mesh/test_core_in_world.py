"""The engine core on heaps of an NVSHMEM world: an owner knows its words by a mirror, which is late."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microserve.kvcache.heap.gpu.nvshmem import NvshmemHeap
from microserve.protocol.messages import engine as wire
from microserve.services.engine.core.batch import Batch, StepResult
from tests.support.engine.core_interleaving import interleave
from tests.support.engine.core_mesh import expect, grant_for, prompt_of, receive, send
from tests.support.index.world_mesh import WorldMesh


def play(seed: int) -> None:
    rng = random.Random(seed)
    mesh = WorldMesh(seed=seed, num_blocks=rng.choice([20, 40, 64]), num_slots=4)
    interleave(mesh, rng, rng.randrange(1, 13))


@given(st.integers(0, 1 << 30))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_interleaving_is_exact_and_leaks_nothing(seed: int) -> None:
    play(seed)


def test_the_interleavings_find_a_store_that_its_message_overtakes(monkeypatch: pytest.MonkeyPatch) -> None:
    store = NvshmemHeap.store

    def store_later(heap: NvshmemHeap, word: int, value: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(heap._driver, "synchronize", lambda stream: None)
            store(heap, word, value)

    monkeypatch.setattr(NvshmemHeap, "store", store_later)
    with pytest.raises(AssertionError):
        for seed in range(20):
            play(seed)


def test_a_step_that_waits_for_a_layer_looks_for_it() -> None:
    mesh = WorldMesh()
    prompt = prompt_of(15)
    granted = grant_for(mesh.b, "r", prompt, 9)
    receive(mesh.b, "r", granted, 9)
    send(mesh.a, "r", prompt, granted, 0, 9)
    execute = mesh.a.runner.execute

    def first_layer_seen(batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult:
        def hooked(layer: int) -> None:
            if on_layer is not None:
                on_layer(layer)
            if layer == 0:
                for driver in mesh.drivers:
                    driver.synchronize(None)
                mesh.b.heap.poll(wait=True)

        return execute(batch, hooked)

    mesh.a.runner.execute = first_layer_seen  # type: ignore[method-assign]
    mesh.a.step()
    for driver in mesh.drivers:
        driver.synchronize(None)

    # All layers are in the memory of ``b``, and one in its mirror: that one lets its step begin.
    assert mesh.b.step()

    assert mesh.b.core.state.counters["early_starts_put_back"] == 0
    assert mesh.b.core.state.scheduler.running
    mesh.run()
    assert expect(prompt) == mesh.b.tokens["r"]
    mesh.close()


def test_lanes_of_a_rank_that_died_are_free_once_it_is_reported() -> None:
    mesh = WorldMesh(seed=1)
    prompt = prompt_of(40)
    granted = grant_for(mesh.b, "r", prompt, 40)
    receive(mesh.b, "r", granted, 40)
    send(mesh.a, "r", prompt, granted, 0, 40)
    mesh.a.step()  # one chunk of several: ``a`` holds a lane, and is never heard of again
    pool, heap = mesh.b.core.memory.pool, mesh.b.core._heap
    assert isinstance(heap, NvshmemHeap)
    mesh.b.core.actions.abort(b"router", wire.Abort(mesh.call(), "r"), mesh.now)
    for _ in range(20):
        mesh.b.heap.poll(wait=True)
        mesh.b.step()
    assert pool.num_quarantined == 10

    with mesh.b.core.lock:
        heap.report_dead(11)
    for _ in range(3):
        mesh.b.heap.poll(wait=True)
        mesh.b.step()

    assert pool.num_quarantined == 0
    mesh.b.core.check_integrity()
