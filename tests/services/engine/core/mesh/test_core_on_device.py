"""The engine core on heaps whose puts come late: exact tokens, and no block has two users.

What a GPU would do to it is done by a driver in host memory (device_mesh.py); what that shows of a GPU is in
docs/gpu.md. The tokens are those of runs on memory heaps (test_core_interleaving.py): the same oracle.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microserve.kvcache.heap.gpu import cuda_ipc
from microserve.kvcache.heap.gpu.cuda_ipc import CudaIpcPeerHeap
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.heap.memfd import lane_byte
from microserve.kvcache.heap.process import _TICK_BITS, _start_time, is_gone
from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import InternalError
from microserve.protocol.messages import engine as wire
from microserve.services.engine.core.batch import Batch, Runner
from microserve.services.engine.core.memory import KvMemory
from microserve.services.engine.core.peers import DEAD_LOOK_S, Peers
from microserve.services.engine.core.scheduler import Step
from tests.support.engine.core_interleaving import interleave
from tests.support.engine.core_mesh import (
    GREEDY,
    ROUTER,
    Engine,
    Mesh,
    expect,
    generate,
    grant_for,
    prompt_of,
    receive,
    send,
)
from tests.support.engine.device.device_mesh import DeviceMesh


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    mesh = DeviceMesh()
    yield mesh
    mesh.is_frozen = False
    mesh.close()


def abort(engine: Engine, request_id: str) -> None:
    engine.core.actions.abort(ROUTER, wire.Abort(engine.mesh.call(), request_id), engine.mesh.now)


# --- tokens


def play(seed: int) -> None:
    rng = random.Random(seed)
    mesh = DeviceMesh(seed=seed, num_blocks=rng.choice([20, 40, 64]), num_slots=4)
    interleave(mesh, rng, rng.randrange(1, 13))


@given(st.integers(0, 1 << 30))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_interleaving_is_exact_and_leaks_nothing(seed: int) -> None:
    play(seed)


def frees_at_once(patch: pytest.MonkeyPatch) -> None:
    """Planted: an ended send's blocks are free while its stream may still read them."""
    patch.setattr(KvMemory, "_depart", lambda *_: False)


def puts_at_once(patch: pytest.MonkeyPatch) -> None:
    """Planted: puts do not wait for the stream that computes what they read."""
    patch.setattr(DeviceMesh, "follows", False)


def never_polls(patch: pytest.MonkeyPatch) -> None:
    """Planted: nobody asks whether puts are done."""
    patch.setattr(Peers, "poll", lambda _: None)


@pytest.mark.parametrize("plant", [frees_at_once, puts_at_once, never_polls])
def test_the_interleavings_find_a_planted_bug(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        for seed in range(20):
            play(seed)


# --- blocks wait for the stream that reads them


def ended_send(mesh: DeviceMesh, how: str) -> list[int]:
    """A send of 40 tokens that is over on ``a`` in the way that is named, with nothing of it on ``b`` yet."""
    prompt = prompt_of(40)
    granted = grant_for(mesh.b, "r", prompt, 40)
    receive(mesh.b, "r", granted, 40)
    send(mesh.a, "r", prompt, granted, 0, 40)
    mesh.is_frozen = True
    engine = mesh.a
    match how:
        case "finish":
            mesh.run()
        case "abort":
            engine.step()
            abort(engine, "r")
        case "router lost":
            engine.step()
            engine.core.state.drop_owner(ROUTER, mesh.now)
        case "deadline":
            engine.step()
            mesh.now += 61.0
            engine.step()
        case "receiver closes":
            engine.step()
            abort(mesh.b, "r")
            engine.step()
        case "step fails":
            engine.step()
            step = engine.core.stepper.next_step(mesh.now)
            assert step is not None
            engine.core.stepper.fail(step, InternalError("logits are not finite"), mesh.now)
    return prompt


ENDS = ["finish", "abort", "router lost", "deadline", "receiver closes", "step fails"]


@pytest.mark.parametrize("how", ENDS)
def test_blocks_of_an_ended_send_wait_for_its_stream(mesh: DeviceMesh, how: str) -> None:
    ended_send(mesh, how)
    core = mesh.a.core
    assert core.state.num_requests == 0
    assert core.memory.is_departing
    core.memory.cache.clear()
    num_used = core.memory.pool.num_used
    assert num_used >= 4

    # Others get the rest, while nothing gets on.
    generate(mesh.a, "other", prompt_of(180, seed=9))
    generate(mesh.a, "small", prompt_of(7, seed=8))
    mesh.run()
    assert core.memory.is_departing
    assert core.memory.pool.num_used >= num_used

    mesh.is_frozen = False
    mesh.run()
    assert not core.memory.is_departing
    assert expect(prompt_of(180, seed=9)) == mesh.a.tokens["other"]
    assert expect(prompt_of(7, seed=8)) == mesh.a.tokens["small"]
    if how == "finish":
        assert expect(prompt_of(40)) == mesh.b.tokens["r"]


def test_a_preempted_send_gives_up_no_block_that_its_stream_may_read(mesh: DeviceMesh) -> None:
    prompt = prompt_of(40)
    granted = grant_for(mesh.b, "r", prompt, 40)
    receive(mesh.b, "r", granted, 40)
    send(mesh.a, "r", prompt, granted, 0, 40)
    mesh.is_frozen = True
    mesh.a.step()
    assert mesh.is_writing

    scheduler = mesh.a.core.state.scheduler
    with mesh.a.core.lock:
        scheduler.preempt(scheduler.running[0], Step(Batch([]), []))
    mesh.a.core.memory.cache.clear()
    assert mesh.a.core.memory.pool.num_used == 0
    # The same blocks, for another one first.
    generate(mesh.a, "other", prompt_of(180, seed=9))
    scheduler.waiting.rotate(1)
    mesh.is_frozen = False
    mesh.run()

    assert expect(prompt_of(180, seed=9)) == mesh.a.tokens["other"]
    assert expect(prompt) == mesh.b.tokens["r"]


@pytest.mark.parametrize("at", range(0, 40, 3))
def test_an_abort_at_any_time_frees_everything(at: int) -> None:
    """Aborts on both sides after each step, with the streams in any state; then the blocks are used again."""
    mesh = DeviceMesh(seed=at, num_blocks=24)
    prompt = prompt_of(40)
    for aborted in (["a"], ["b"], ["a", "b"]):
        granted = grant_for(mesh.b, "r", prompt, 40)
        receive(mesh.b, "r", granted, 40, await_first=True)
        send(mesh.a, "r", prompt, granted, 0, 40, sampling=GREEDY)
        for _ in range(at // 6):
            mesh.now += 0.001
            mesh.drift()
            mesh.a.step()
            mesh.b.step()
        for engine in (mesh.a, mesh.b):
            if engine.core.engine_id in aborted:
                abort(engine, "r")
        for engine in (mesh.a, mesh.b):
            generate(engine, "next", prompt_of(60, seed=7))
        mesh.run()
        abort(mesh.a, "r")
        abort(mesh.b, "r")
        mesh.run()
        for engine in (mesh.a, mesh.b):
            assert expect(prompt_of(60, seed=7)) == engine.tokens["next"]
            engine.assert_clean()
            engine.core.memory.cache.clear()
            engine.collect()
            engine.tokens.clear()
            engine.finished.clear()
    mesh.close()


# --- ends of engines


def test_a_draining_engine_stays_until_its_puts_are_done(mesh: DeviceMesh) -> None:
    ended_send(mesh, "finish")
    mesh.a.core.state.draining = True
    assert not mesh.a.core.state.is_drained(mesh.now)

    mesh.is_frozen = False
    mesh.run()
    assert mesh.a.core.state.is_drained(mesh.now)


def test_an_engine_that_closes_with_puts_on_their_way_leaves_nothing_behind() -> None:
    mesh = DeviceMesh()
    ended_send(mesh, "finish")
    mesh.a.core.close()

    assert mesh.a.core.memory.pool.num_used == 0
    assert not mesh.is_writing
    for _ in range(50):
        mesh.now += 0.001
        mesh.b.step()
    assert expect(prompt_of(40)) == mesh.b.tokens["r"]
    mesh.b.assert_clean()
    mesh.b.core.close()


def test_a_receiver_that_is_gone_is_left_once_nothing_is_on_its_way(mesh: DeviceMesh) -> None:
    prompt = ended_send(mesh, "finish")
    mesh.b.core.close()
    mesh.now += DEAD_LOOK_S
    mesh.a.step()
    assert mesh.a.core.memory.is_departing

    mesh.is_frozen = False
    for _ in range(500):
        mesh.now += 0.01
        mesh.drift()
        mesh.a.step()
    mesh.a.assert_clean()
    assert not mesh.a.core._peers._open
    generate(mesh.a, "next", prompt)
    while mesh.a.step():
        mesh.now += 0.001
    assert expect(prompt) == mesh.a.tokens["next"]
    mesh.b = Engine(mesh, "b", 23)


def test_a_sender_that_dies_is_noticed_when_it_is_gone_and_not_before(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``a`` writes in the name of another process; that one's death is ``a``'s."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        word = process.pid << _TICK_BITS | _start_time(process.pid)
        monkeypatch.setattr(cuda_ipc, "this_process", lambda: word)
        prompt = prompt_of(40)
        granted = grant_for(mesh.b, "r", prompt, 40)
        receive(mesh.b, "r", granted, 40)
        send(mesh.a, "r", prompt, granted, 0, 40)
        mesh.a.step()
        for _ in range(200):
            mesh.drift()
        (peer,) = mesh.a.core._peers._open.values()
        assert isinstance(peer, CudaIpcPeerHeap)
        # A dying process loses its locks first, while its copies may run on.
        peer._file.unlock(lane_byte(granted.grant.slot, 0))
        for _ in range(20):
            mesh.now += 0.1
            mesh.b.step()
        assert "r" not in mesh.b.finished
        process.kill()
        process.wait()
    assert is_gone(word)
    for _ in range(20):
        mesh.now += 0.1
        mesh.b.step()
    assert mesh.b.finished["r"].code == "transfer_failed"
    mesh.b.assert_clean()


class Mixed(DeviceMesh):
    """``b`` has a heap of another kind."""

    def equip(self, layout: KvLayout, incarnation: int, num_slots: int) -> tuple[Heap, Runner, int | None]:
        if self.drivers:
            return Mesh.equip(self, layout, incarnation, num_slots)
        return super().equip(layout, incarnation, num_slots)


@pytest.mark.parametrize("sender", ["a", "b"])
def test_heaps_that_cannot_meet_fail_the_send_and_nothing_else(sender: str) -> None:
    """Routers try again without the other engine (tests/services/router/serving/test_serving.py)."""
    mesh = Mixed()
    here, there = (mesh.b, mesh.a) if sender == "a" else (mesh.a, mesh.b)
    prompt = prompt_of(30)
    granted = grant_for(here, "r", prompt, 20)
    call = send(there, "r", prompt, granted, 0, 20)
    generate(there, "s", prompt)
    mesh.run()

    failed = there.replies[call]
    assert isinstance(failed, wire.Failed)
    assert (failed.code, failed.detail.split(" ")[2]) == ("transfer_failed", "heap")
    assert expect(prompt) == there.tokens["s"]
    abort(here, "r")
    generate(here, "r", prompt)
    mesh.run()
    assert expect(prompt) == here.tokens["r"]
    mesh.close()
