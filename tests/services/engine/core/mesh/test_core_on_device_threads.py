"""Engine cores on device heaps at work in their step threads; requests and aborts from another thread."""

from __future__ import annotations

import random
import threading
import time
from functools import partial

from microserve.kvcache.heap.gpu.cuda_ipc import CudaIpcHeap
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import CacheFull
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Runner
from microserve.services.engine.step_thread import StepThread
from tests.support.engine.core_mesh import ROUTER, Engine, expect, grant_for, prompt_of, receive, send
from tests.support.engine.device.device_mesh import DeviceMesh, StreamRunner
from tests.support.engine.device.host_driver import HostDriver

TIMEOUT_S = 60.0


class ThreadedMesh(DeviceMesh):
    """In real time; streams run on threads of their drivers."""

    def equip(self, layout: KvLayout, incarnation: int, num_slots: int) -> tuple[Heap, Runner, int | None]:
        driver = HostDriver(threaded=True)
        heap = CudaIpcHeap(layout, incarnation=incarnation, driver=driver, num_slots=num_slots)
        runner = StreamRunner(heap, driver, lambda: None)
        return heap, runner, runner.stream

    @property
    def now(self) -> float:
        return time.monotonic()

    @now.setter
    def now(self, value: float) -> None:
        """Passes by itself."""

    def other_step(self, engine: Engine) -> None:
        time.sleep(0.0002)


def test_engines_at_work_answer_right_and_free_everything_when_idle() -> None:
    mesh = ThreadedMesh(num_blocks=64, num_slots=4)
    engines, rng = {"a": mesh.a, "b": mesh.b}, random.Random(5)
    stepped, crashes = threading.Condition(), []

    def on_output(engine: Engine) -> None:
        with engine.core.lock:
            engine.collect()
        with stepped:
            stepped.notify_all()

    def abort(request_id: str) -> None:
        for engine in engines.values():
            with engine.core.lock:
                engine.core.actions.abort(ROUTER, wire.Abort(mesh.call(), request_id), mesh.now)
                engine.core.wake()

    loops = [StepThread(e.core, partial(on_output, e), lambda: crashes.append(1)) for e in engines.values()]
    for loop in loops:
        loop.start()
    deadline = time.monotonic() + TIMEOUT_S
    wanted: dict[str, tuple[Engine, list[int], SamplingParams]] = {}
    calls: dict[int, str] = {}
    try:
        for number in range(60):
            here, there = rng.sample([mesh.a, mesh.b], 2)
            request_id, prompt = f"r{number}", prompt_of(rng.randrange(2, 60), seed=number % 7)
            params = SamplingParams(max_tokens=rng.randrange(1, 8), temperature=0.0, ignore_eos=True)
            border = rng.randrange(1, len(prompt))
            granted = None
            while granted is None:
                try:
                    with here.core.lock:
                        granted = grant_for(here, request_id, prompt, border)
                        receive(here, request_id, granted, border, params)
                        here.core.wake()
                except CacheFull:
                    assert not crashes and time.monotonic() < deadline
                    with stepped:
                        stepped.wait(0.01)
            wanted[request_id] = (here, prompt, params)
            if granted.grant.matched < border:
                with there.core.lock:
                    calls[send(there, request_id, prompt, granted, 0, border)] = request_id
                    there.core.wake()
            if rng.random() < 0.25:
                abort(request_id)
                del wanted[request_id]
            with stepped:
                stepped.wait(0.005)

        def open_requests() -> list[str]:
            failed = {c for e in engines.values() for c, r in e.replies.items() if isinstance(r, wire.Failed)}
            for call in failed & calls.keys():
                request_id = calls.pop(call)
                if wanted.pop(request_id, None):  # as a router would
                    abort(request_id)
            return [r for r, (engine, _, _) in wanted.items() if r not in engine.finished]

        def is_idle(engine: Engine) -> bool:
            with engine.core.lock:
                memory = engine.core.memory
                return not (memory.is_departing or memory.pool.num_used or memory.pool.num_quarantined)

        while open_requests() or not (is_idle(mesh.a) and is_idle(mesh.b)):
            assert not crashes and time.monotonic() < deadline, open_requests()
            with stepped:
                stepped.wait(0.1)
    finally:
        stopped = [loop.stop(10.0) for loop in loops]
    assert all(stopped)
    assert len(wanted) > 20
    for request_id, (engine, prompt, params) in wanted.items():
        assert engine.finished[request_id].reason == "length"
        assert expect(prompt, params) == engine.tokens[request_id]
    for engine in engines.values():
        engine.assert_clean()
        engine.core.close()
