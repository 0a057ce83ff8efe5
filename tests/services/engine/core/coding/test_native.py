"""Transfers by a codec between two engines that compute: bit for bit where nothing is lost; where something
is, the answer says so, and no cache keeps it. Encoders and decoders are threads here."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from microserve.kvcache.codec.library import BUILT_IN, Cost, Library, Measured, Quality
from microserve.kvcache.codec.profile import Levels, Profile
from microserve.kvcache.heap.local import MemoryHeap
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.coding import Coding
from microserve.protocol.messages.numerics import MIXED
from microserve.services.engine.core.coding.choice import CodecOptions
from tests.support.engine.core_mesh import (
    GREEDY,
    ROUTER,
    Engine,
    generate,
    grant_for,
    prompt_of,
    receive,
    send,
)
from tests.support.engine.native_mesh import NativeMesh
from tests.support.kvcache.encoded import read_rows

LOSSY = Profile("u6-pack", quantiser="uniform", keys=Levels(6), values=Levels(6), coder="pack")
LIBRARY = Library(entries=[Measured(LOSSY, 4.0, Cost(), Cost(), Quality(0.99, 0.98, 1.0))])
WAIT_S = 60.0


class Rig(NativeMesh):
    codecs = CodecOptions(LIBRARY, num_threads=2)

    def other_step(self, engine: Engine) -> None:
        """What a step of B waits for is encoded by now, it may be, and A has to put it."""
        super().other_step(engine)
        if engine is self.b:
            self.a.step()
        time.sleep(0.001)

    @property
    def numerics(self) -> str:
        """The class of both: what is mixed is so by a loss."""
        return self.a.core.numerics.name

    def run_until(self, *finished: str) -> None:
        """Step both while threads work for them."""
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            self.run()
            if all(name in self.b.finished for name in finished):
                return
            time.sleep(0.001)
        raise AssertionError(f"not finished: {finished}")


@pytest.fixture
def mesh() -> Iterator[Rig]:
    mesh = Rig(num_blocks=96)
    yield mesh
    rest(mesh)
    mesh.close()


def rest(mesh: Rig) -> None:
    """Nobody encodes or decodes any more."""
    end = time.monotonic() + WAIT_S
    while mesh.a.core.state.encoding or mesh.a.core.memory.is_departing or mesh.b.core.state.receiving:
        mesh.run()
        time.sleep(0.001)
        assert time.monotonic() < end, "it does not come to rest"


def coding_of(engine: Engine, call: int) -> Coding:
    reply = engine.replies[call]
    assert isinstance(reply, wire.Sent) and reply.coding is not None
    return reply.coding


def alone(prompt: list[int]) -> list[int]:
    mesh = NativeMesh(num_blocks=96)
    generate(mesh.a, "alone", prompt)
    mesh.run()
    tokens = mesh.a.tokens["alone"]
    mesh.close()
    return tokens


@pytest.mark.parametrize("codec", [entry.profile.name for entry in BUILT_IN.entries])
def test_what_loses_nothing_gives_the_same_bits(mesh: Rig, codec: str) -> None:
    prompt = prompt_of(90)
    granted = grant_for(mesh.b, "r", prompt, 86)
    call = send(mesh.a, "r", prompt, granted, 0, 86, codec=codec)
    receive(mesh.b, "r", granted, 86, numerics=mesh.numerics)
    mesh.run_until("r")

    assert mesh.b.tokens["r"] == alone(prompt)
    coding = coding_of(mesh.a, call)
    assert coding.wire_nbytes < coding.raw_nbytes
    assert not coding.is_lossy
    assert mesh.b.finished["r"].numerics == mesh.b.core.numerics
    sender, receiver = mesh.a.core.memory, mesh.b.core.memory
    theirs, ours = (memory.cache.acquire(prompt, 84, "") for memory in (sender, receiver))
    assert len(ours) == len(theirs) == 21
    heaps = mesh.a.heap, mesh.b.heap
    assert isinstance(heaps[0], MemoryHeap) and isinstance(heaps[1], MemoryHeap)
    assert (read_rows(heaps[0], theirs, 84) == read_rows(heaps[1], ours, 84)).all()
    sender.pool.free(theirs)
    receiver.pool.free(ours)


def test_an_answer_from_lossy_kv_is_mixed_and_in_no_cache(mesh: Rig) -> None:
    prompt = prompt_of(90)
    granted = grant_for(mesh.b, "r", prompt, 86, may_lose=True)
    call = send(mesh.a, "r", prompt, granted, 0, 86, codec=LOSSY.name, may_lose=True)
    receive(mesh.b, "r", granted, 86, numerics=mesh.numerics)
    mesh.run_until("r")

    assert coding_of(mesh.a, call).is_lossy
    assert coding_of(mesh.a, call).wire_nbytes < coding_of(mesh.a, call).raw_nbytes / 2
    finished = mesh.b.finished["r"].numerics
    assert finished.name == MIXED and not finished.is_exact
    assert not mesh.b.core.memory.cache.snapshot(), "nothing of it can be hit, or was announced"
    generate(mesh.b, "again", prompt)
    mesh.run_until("again")
    assert mesh.b.finished["again"].usage.cached_tokens == 0
    assert mesh.b.finished["again"].numerics == mesh.b.core.numerics
    assert mesh.b.tokens["again"] == alone(prompt)


def test_a_commit_of_lossy_kv_caches_none(mesh: Rig) -> None:
    prompt = prompt_of(64)
    granted = grant_for(mesh.b, "r", prompt, 64, may_lose=True)
    send(mesh.a, "r", prompt, granted, 0, 64, codec=LOSSY.name, may_lose=True)
    call = mesh.call()
    message = wire.Commit(call, "r", granted.grant.grant_id, 60.0, mesh.numerics)
    mesh.b.core.actions.commit(ROUTER, message, mesh.now)
    end = time.monotonic() + WAIT_S
    while call not in mesh.b.replies:
        mesh.run()
        time.sleep(0.001)
        assert time.monotonic() < end
    assert mesh.b.replies[call] == wire.Committed(call, 0)
    assert not mesh.b.core.memory.cache.snapshot()


def test_a_sender_without_leave_sends_kv_as_it_is(mesh: Rig) -> None:
    """Its receiver's leave is not its own."""
    prompt = prompt_of(40)
    granted = grant_for(mesh.b, "r", prompt, 38, may_lose=True)
    call = send(mesh.a, "r", prompt, granted, 0, 38, codec=LOSSY.name)
    receive(mesh.b, "r", granted, 38, numerics=mesh.numerics)
    mesh.run_until("r")
    assert mesh.b.tokens["r"] == alone(prompt)
    assert (coding_of(mesh.a, call).profile, coding_of(mesh.a, call).reason) == ("none", "refused")
    assert mesh.b.finished["r"].numerics == mesh.b.core.numerics


def test_a_receiver_without_leave_refuses_by_itself(mesh: Rig) -> None:
    """Whatever its sender was told."""
    prompt = prompt_of(40)
    granted = grant_for(mesh.b, "r", prompt, 38)
    send(mesh.a, "r", prompt, granted, 0, 38, codec=LOSSY.name, may_lose=True)
    receive(mesh.b, "r", granted, 38, numerics=mesh.numerics)
    mesh.run_until("r")
    assert mesh.b.finished["r"].code == "transfer_failed"
    assert "allows no loss" in mesh.b.finished["r"].detail
    assert not mesh.b.tokens.get("r")


def test_preempted_lossy_kv_is_computed_anew_and_the_answer_stays_mixed(mesh: Rig) -> None:
    prompt = prompt_of(40)
    granted = grant_for(mesh.b, "r", prompt, 38, may_lose=True)
    send(mesh.a, "r", prompt, granted, 0, 38, codec=LOSSY.name, may_lose=True)
    receive(mesh.b, "r", granted, 38, numerics=mesh.numerics)
    end = time.monotonic() + WAIT_S
    while not mesh.b.tokens.get("r"):
        mesh.a.step()
        mesh.b.step()
        time.sleep(0.001)
        assert time.monotonic() < end
    [sequence] = mesh.b.core.state.scheduler.running
    assert sequence.has_lossy_kv
    with mesh.b.core.lock:
        step = mesh.b.core.stepper.next_step(mesh.now)
        assert step is not None
        mesh.b.core.state.inflight = []
        mesh.b.core.state.scheduler.preempt(sequence, step)
    assert not sequence.has_lossy_kv
    mesh.run_until("r")
    assert mesh.b.finished["r"].numerics.name == MIXED
    assert len(mesh.b.tokens["r"]) == GREEDY.max_tokens
