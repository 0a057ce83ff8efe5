"""An engine that has no descriptor, or no memory for a lock, loses a transfer and nothing else."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
from collections.abc import Iterator
from typing import Any

import pytest

from microserve.kvcache.heap import process
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.heap.memfd import boot_id
from microserve.kvcache.heap.shm import ShmHeap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.messages import engine as wire
from microserve.services.engine.core.batch import Runner
from microserve.services.simulation.engine.hash_runner import HashRunner
from tests.support.engine import core_mesh
from tests.support.engine.core_mesh import VOCAB, expect, generate, grant_for, prompt_of, receive, send
from tests.support.process.descriptors import no_descriptors


class Mesh(core_mesh.Mesh):
    """On shared memory, as real engines are."""

    def equip(self, layout: KvLayout, incarnation: int, num_slots: int) -> tuple[Heap, Runner, int | None]:
        heap = ShmHeap(layout, incarnation=incarnation, num_slots=num_slots)
        return heap, HashRunner(heap.data, layout, vocab_size=VOCAB), None


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    made = Mesh()
    yield made
    made.close()


def transfer(mesh: Mesh, name: str) -> wire.EngineReply:
    """From a to b, and what a answers."""
    prompt = prompt_of(13, seed=len(name))
    granted = grant_for(mesh.b, name, prompt, 13)
    call = send(mesh.a, name, prompt, granted, 0, 13)
    mesh.run()
    mesh.b.core.state.abort(next(iter(mesh.b.core.state.records)), mesh.now)
    mesh.run()
    return mesh.a.replies[call]


def test_a_send_without_a_descriptor_fails_alone(mesh: Mesh) -> None:
    boot_id.cache_clear()
    running = prompt_of(7)
    generate(mesh.a, "running", running)
    with no_descriptors():
        failed = transfer(mesh, "first")
    assert isinstance(failed, wire.Failed)
    assert failed.code == "transfer_failed"
    assert mesh.a.tokens["running"] == expect(running)
    assert isinstance(transfer(mesh, "second one"), wire.Sent)


CALLS = [(os, "open"), (os, "readlink"), (os, "pread"), (os, "fstat"), (mmap, "mmap")]
"""What the kernel is asked for when a peer's heap is opened."""
ERRORS = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO]


@pytest.mark.parametrize(("owner", "name"), CALLS, ids=[name for _, name in CALLS])
def test_each_call_for_a_peers_heap_may_fail_and_costs_that_send_only(
    mesh: Mesh, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, count, chosen, number = getattr(owner, name), 0, 0, 0

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == chosen:
            raise OSError(number, os.strerror(number))
        return true(*arguments, **named)

    monkeypatch.setattr(owner, name, call)
    assert isinstance(transfer(mesh, "whole"), wire.Sent)
    gc.collect()  # of what tests before have left
    num_calls, num_open = count, len(os.listdir("/proc/self/fd"))
    assert num_calls > 0
    for number in ERRORS:
        for each in range(1, num_calls + 1):
            mesh.a.core._peers.close()
            count, chosen = 0, each
            assert isinstance(transfer(mesh, f"{number} {each}"), wire.Failed)
            chosen = 0
            assert isinstance(transfer(mesh, f"{number} {each} again"), wire.Sent)
    assert len(os.listdir("/proc/self/fd")) == num_open, "nothing leaks"


def test_a_transfer_to_a_known_peer_and_the_proof_that_it_lives_need_no_descriptor(mesh: Mesh) -> None:
    assert isinstance(transfer(mesh, "first"), wire.Sent)
    prompt = prompt_of(9)
    with no_descriptors():
        granted = grant_for(mesh.b, "second", prompt, 9)
        send(mesh.a, "second", prompt, granted, 0, 9)
        receive(mesh.b, "second", granted, 9)
        mesh.now += 10.0  # a look for dead owners is due
        mesh.run()
    assert mesh.b.tokens["second"] == expect(prompt)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOMEM])
def test_a_lock_that_the_kernel_has_no_memory_for_is_not_taken_for_a_free_lane(
    mesh: Mesh, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_fcntl = fcntl.fcntl

    def fail(fd: Any, command: int, *rest: Any) -> Any:
        if command in (fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK):
            raise OSError(number, os.strerror(number))
        return true_fcntl(fd, command, *rest)

    assert isinstance(transfer(mesh, "first"), wire.Sent)
    prompt = prompt_of(9)
    granted = grant_for(mesh.b, "second", prompt, 9)
    call = send(mesh.a, "second", prompt, granted, 0, 9)
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "fcntl", fail)
        assert mesh.b.heap.is_held(0, 0), "unsure is held"
        mesh.now += 10.0
        for _ in range(20):
            mesh.now += 0.001
            mesh.a.step()
            mesh.b.step()
    mesh.run()
    assert isinstance(mesh.a.replies[call], wire.Failed)


def test_a_process_that_was_reaped_is_proven_gone_without_a_descriptor() -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, process.this_process().to_bytes(8, "little"))
        os._exit(0)
    word = int.from_bytes(os.read(read, 8), "little")
    os.waitpid(pid, 0)
    os.close(read)
    os.close(write)
    mine = process.this_process()
    with no_descriptors():
        assert process.is_gone(word)
        assert not process.is_gone(mine)
