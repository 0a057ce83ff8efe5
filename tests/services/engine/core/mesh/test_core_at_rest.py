"""An engine that has nothing to do sleeps until somebody comes; one that may have to end something looks."""

from __future__ import annotations

import threading
from typing import Any

from microserve.kvcache.heap.local import MemoryHeap, MemoryRegistry
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.grant import MAX_LANES
from microserve.services.engine.core.checks import Limits
from microserve.services.engine.core.core import ARRIVAL_POLL_S, EngineCore
from microserve.services.engine.core.peers import DEAD_LOOK_S
from microserve.services.engine.core.request.record import IDLE_RECORD_S
from microserve.services.engine.core.state import PURGE_INTERVAL_S
from microserve.services.simulation.engine.hash_runner import HashRunner, hash_layout
from tests.support.engine.core_mesh import ROUTER, Mesh, generate, grant_for, prompt_of, receive, send

LOOK_S = 0.05


class Waits:
    """In the place of the condition: notes for how long it was waited, and does not wait."""

    def __init__(self) -> None:
        self.seconds: list[float | None] = []
        self._lock = threading.RLock()

    def __enter__(self) -> bool:
        return self._lock.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._lock.__exit__(*error)

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout)
        return True

    def notify_all(self) -> None: ...


def wait_of(core: EngineCore) -> float | None:
    """How long its step thread would wait now."""
    changed, core._changed = core._changed, Waits()
    core._woken = False
    core.wait_for_work(LOOK_S)
    waits, core._changed = core._changed, changed
    assert isinstance(waits, Waits)
    (seconds,) = waits.seconds
    return seconds


def test_with_nothing_to_do_it_sleeps_until_it_is_woken() -> None:
    layout = hash_layout(num_blocks=8)
    heap = MemoryHeap(layout, incarnation=5, registry=MemoryRegistry(), num_slots=8)
    core = EngineCore(
        engine_id="e",
        incarnation=5,
        model="hash",
        heap=heap,
        runner=HashRunner(heap.data, layout, vocab_size=500),
        limits=Limits(100, 500, 8, 32, frozenset({0})),
        max_num_seqs=8,
        max_num_batched_tokens=16,
        lease_s=5.0,
        checksums=True,
    )

    assert not core.step()
    assert wait_of(core) is None
    core.close()


def test_what_time_may_end_is_looked_at_and_what_is_on_its_way_often() -> None:
    mesh = Mesh(num_blocks=64)
    prompt = prompt_of(24)

    granted = grant_for(mesh.b, "moved", prompt, 20)
    assert wait_of(mesh.b.core) == LOOK_S  # the lease
    send(mesh.a, "moved", prompt, granted, 0, 20)
    receive(mesh.b, "moved", granted, 20)
    assert wait_of(mesh.b.core) == ARRIVAL_POLL_S
    mesh.run()
    assert wait_of(mesh.a.core) == PURGE_INTERVAL_S  # the sender's record, whose router may ask once more
    mesh.now += IDLE_RECORD_S + 2 * PURGE_INTERVAL_S
    mesh.a.step()
    assert wait_of(mesh.a.core) == DEAD_LOOK_S  # the peer's heap is open
    assert wait_of(mesh.b.core) is None
    mesh.close()


def test_a_closed_grant_whose_writer_holds_a_lane_is_looked_at() -> None:
    mesh = Mesh(num_blocks=64)
    prompt = prompt_of(24)
    granted = grant_for(mesh.b, "moved", prompt, 20)
    peer = mesh.a.core._heap.attach(granted.grant.heap)
    assert peer.hold(granted.grant.slot, MAX_LANES - 1)
    with mesh.b.core.lock:
        mesh.b.core.actions.abort(ROUTER, wire.Abort(1, "moved"), mesh.now)
    mesh.b.step()

    assert wait_of(mesh.b.core) == LOOK_S
    peer.let_go(granted.grant.slot, MAX_LANES - 1)
    mesh.b.step()
    assert wait_of(mesh.b.core) is None
    peer.close()
    mesh.close()


def test_a_request_that_runs_has_a_deadline() -> None:
    mesh = Mesh(num_blocks=64)
    generate(mesh.a, "one", prompt_of(12))

    assert wait_of(mesh.a.core) == LOOK_S
    mesh.run()
    mesh.close()
