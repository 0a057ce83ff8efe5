"""Lanes behind a network: who waits for one keeps nobody else waiting, and what comes too late is let go."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from microserve.kvcache.heap.doors.door import Entrance
from microserve.kvcache.heap.doors.host import HostHeap, Opening
from microserve.kvcache.heap.doors.tcp import frames
from microserve.kvcache.heap.doors.tcp import peer as peer_module
from microserve.kvcache.heap.doors.tcp.door import Caller, TcpDoor
from microserve.kvcache.heap.doors.tcp.inbound import Frame
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import TransferFailed
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.grant import HeapAddress
from microserve.services.engine.core.batch import Runner
from microserve.services.engine.core.request.sequence import SequenceState
from microserve.services.simulation.engine.hash_runner import HashRunner
from tests.support.engine.core_mesh import (
    GREEDY,
    ROUTER,
    VOCAB,
    Mesh,
    expect,
    generate,
    grant_for,
    prompt_of,
    send,
)

TIMEOUT_S = 60.0
PROMPT = prompt_of(10, seed=1)


class FarMesh(Mesh):
    """Engines that reach each other through doors alone."""

    def equip(self, layout: KvLayout, incarnation: int, num_slots: int) -> tuple[Heap, Runner, int | None]:
        heap = HostHeap(
            layout,
            incarnation=incarnation,
            num_slots=num_slots,
            opening=Opening(["tcp"], silence_s=600.0, shares_memory=False),
        )
        heap.back(0, layout.num_blocks)
        return heap, HashRunner(heap.data, layout, vocab_size=VOCAB), None

    def run_until(self, condition: Callable[[], object]) -> None:
        """Step both; what is on its way elsewhere in this process takes real time."""
        until = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < until, "it does not come about"
            if not self.a.step() | self.b.step():
                self.a.core.wait_for_work(0.01)


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Iterator[FarMesh]:
    for name in ("ATTACH_S", "HOLD_S"):  # nobody here gives up by himself
        monkeypatch.setattr(peer_module, name, 600.0)
    mesh = FarMesh()
    yield mesh
    for engine in (mesh.a, mesh.b):
        for record in list(engine.core.state.records):
            engine.core.state.abort(record, mesh.now)
    mesh.run_until(
        lambda: not mesh.b.core.memory.pool.num_quarantined and not mesh.a.core.memory.is_departing
    )
    mesh.a.assert_clean()
    mesh.b.assert_clean()
    for engine in (mesh.a, mesh.b):
        engine.core.close()


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Doors answer nobody who wants a lane until it is set."""
    event, apply = threading.Event(), TcpDoor._apply

    def wait(door: TcpDoor, caller: Caller, frame: Any) -> None:
        if isinstance(frame, Frame) and frame.kind == frames.HOLD:
            assert event.wait(TIMEOUT_S)
        apply(door, caller, frame)

    monkeypatch.setattr(TcpDoor, "_apply", wait)
    return event


def moved(address: HeapAddress, port: int) -> HeapAddress:
    """The same heap, as if its door were at another port of this host."""
    entrance = msgspec.msgpack.decode(address.door, type=Entrance)
    entrance = msgspec.structs.replace(entrance, where=f"127.0.0.1:{port}".encode())
    return msgspec.structs.replace(address, fd=port, door=msgspec.msgpack.encode(entrance))


def claiming(mesh: FarMesh) -> int:
    return len(mesh.a.core.state.claiming)


def test_an_owner_that_answers_nothing_at_its_door_stalls_no_other_request(mesh: FarMesh) -> None:
    """It takes connections, and says no word: as a host whose processes are frozen."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        granted = grant_for(mesh.b, "far", PROMPT, len(PROMPT))
        grant = msgspec.structs.replace(
            granted.grant, heap=moved(granted.grant.heap, silent.getsockname()[1])
        )
        call = send(mesh.a, "far", PROMPT, wire.Granted(1, grant), 0, len(PROMPT))
        connection, _ = silent.accept()
        with connection:
            generate(mesh.a, "near", other := prompt_of(20, seed=2))
            steps = mesh.a.core.stepper.num_steps
            while "near" not in mesh.a.finished:
                assert mesh.a.step(), "no step waits for anything"
            assert mesh.a.tokens["near"] == expect(other)
            assert mesh.a.core.stepper.num_steps - steps >= GREEDY.max_tokens
            assert claiming(mesh) == 1 and call not in mesh.a.replies
    mesh.run_until(lambda: call in mesh.a.replies)  # the owner hangs up
    reply = mesh.a.replies[call]
    assert isinstance(reply, wire.Failed) and reply.code == TransferFailed.code
    assert "out of reach" in reply.detail


def test_a_lane_that_is_long_in_coming_stalls_no_other_request(
    mesh: FarMesh, answering: threading.Event
) -> None:
    granted = grant_for(mesh.b, "far", PROMPT, len(PROMPT) - 1)
    mesh.b.core.actions.start_generate(
        ROUTER,
        wire.StartGenerate(mesh.call(), "far", len(PROMPT) - 1, GREEDY, 60.0, granted.grant.grant_id),
        PROMPT,
        mesh.now,
    )
    call = send(mesh.a, "far", PROMPT, granted, 0, len(PROMPT) - 1)
    generate(mesh.a, "near", other := prompt_of(20, seed=2))
    while "near" not in mesh.a.finished:
        assert mesh.a.step()
    assert mesh.a.tokens["near"] == expect(other)
    assert claiming(mesh) == 1 and call not in mesh.a.replies

    answering.set()
    mesh.run_until(lambda: "far" in mesh.b.finished)
    assert mesh.b.tokens["far"] == expect(PROMPT)
    mesh.run_until(lambda: call in mesh.a.replies)
    assert isinstance(mesh.a.replies[call], wire.Sent)


def test_a_lane_that_comes_after_an_abort_is_let_go(mesh: FarMesh, answering: threading.Event) -> None:
    granted = grant_for(mesh.b, "far", PROMPT, len(PROMPT))
    call = send(mesh.a, "far", PROMPT, granted, 0, len(PROMPT))
    assert claiming(mesh) == 1
    mesh.a.core.actions.abort(ROUTER, wire.Abort(mesh.call(), "far"), mesh.now)
    mesh.a.step()
    assert isinstance(mesh.a.replies[call], wire.Failed)
    assert claiming(mesh) == 0
    answering.set()
    # A lane that is held still would keep the blocks of its grant, and this one would end for want of it.
    again = send(mesh.a, "again", PROMPT, grant_for(mesh.b, "again", PROMPT, len(PROMPT)), 0, len(PROMPT))
    mesh.run_until(lambda: again in mesh.a.replies)
    assert isinstance(mesh.a.replies[again], wire.Sent)


def test_a_send_whose_grant_is_closed_before_its_turn_keeps_no_blocks(mesh: FarMesh) -> None:
    """Its lane is taken, and there is no place for it to run."""
    mesh.a.core.state.scheduler._max_num_seqs = 0
    granted = grant_for(mesh.b, "far", PROMPT, len(PROMPT))
    call = send(mesh.a, "far", PROMPT, granted, 0, len(PROMPT))
    mesh.run_until(lambda: claiming(mesh) == 0)
    [sequence] = mesh.a.core.state.scheduler.waiting
    assert sequence.is_send and sequence.state is SequenceState.WAITING
    assert mesh.b.heap.is_held(granted.grant.slot, 0)

    mesh.b.core.actions.release(ROUTER, wire.Release(mesh.call(), "far", granted.grant.grant_id), mesh.now)
    mesh.run_until(lambda: call in mesh.a.replies)
    reply = mesh.a.replies[call]
    assert isinstance(reply, wire.Failed) and "closed" in reply.detail
    assert mesh.a.core.stepper.num_steps == 0
    mesh.run_until(lambda: not mesh.b.core.memory.pool.num_quarantined)
