"""Numerics classes in a core: what is made of KV of another class, and that none of it becomes cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.heap.local import MemoryHeap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import InternalError
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.numerics import MIXED, Numerics
from microserve.services.engine.core.batch import Runner
from microserve.services.simulation.engine.hash_runner import HashRunner
from tests.support.engine.core_mesh import (
    GREEDY,
    ROUTER,
    VOCAB,
    Engine,
    Mesh,
    expect,
    generate,
    grant_for,
    prompt_of,
    receive,
    send,
)

OURS = Numerics("ours-fp32-1", is_exact=True)
LOOSE = Numerics("loose-fp32-1")


class ClassMesh(Mesh):
    """Both engines compute the same; ``b``, which receives, says what class it is of."""

    def __init__(self, numerics: Numerics, **options: int) -> None:
        self.numerics = numerics
        super().__init__(**options)

    def equip(self, layout: KvLayout, incarnation: int, num_slots: int) -> tuple[Heap, Runner, int | None]:
        heap = MemoryHeap(layout, incarnation=incarnation, registry=self.registry, num_slots=num_slots)
        return heap, HashRunner(heap.data, layout, vocab_size=VOCAB, numerics=self.numerics), None

    @property
    def cached(self) -> int:
        return self.b.core.memory.cache.num_blocks

    def receive(self, request_id: str, prompt: list[int], numerics: str, *, end: int) -> wire.Finished:
        """``b`` generates on KV of ``[0, end)`` that ``a`` sends, in the class of that name."""
        granted = grant_for(self.b, request_id, prompt, end)
        samples = end == len(prompt) and granted.grant.matched < end
        send(self.a, request_id, prompt, granted, 0, end, sampling=GREEDY if samples else None)
        receive(self.b, request_id, granted, end, await_first=samples, numerics=numerics)
        self.run()
        assert [t for t in self.b.tokens[request_id] if t >= 0] == expect(prompt)[samples:]
        return self.b.finished[request_id]


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> Iterator[ClassMesh]:
    mesh = ClassMesh(getattr(request, "param", OURS))
    yield mesh
    mesh.close()


def test_a_grant_and_the_end_of_a_stream_say_the_engines_class(mesh: ClassMesh) -> None:
    prompt = prompt_of(20)

    assert grant_for(mesh.a, "g", prompt, 16).grant.numerics == OURS.name
    generate(mesh.b, "r", prompt)
    mesh.run()

    assert mesh.b.finished["r"].numerics == OURS


@pytest.mark.parametrize("end", [12, 16, 20])
def test_kv_of_the_own_class_is_as_good_as_computed_here(mesh: ClassMesh, end: int) -> None:
    prompt = prompt_of(20)

    finished = mesh.receive("r", prompt, OURS.name, end=end)

    assert finished.numerics == OURS
    assert mesh.cached == (20 + 5) // 4


@pytest.mark.parametrize("numerics", [LOOSE.name, MIXED, ""], ids=["another", "mixed", "not said"])
@pytest.mark.parametrize("end", [12, 16, 20])
def test_kv_of_another_class_serves_one_answer_and_never_the_cache(
    mesh: ClassMesh, end: int, numerics: str
) -> None:
    prompt = prompt_of(20)

    finished = mesh.receive("r", prompt, numerics, end=end)

    assert finished.numerics == Numerics(MIXED)
    assert mesh.cached == 0
    assert mesh.b.core.state.counters["generate_mixed"] == 1
    # The next one with the same prompt is computed here, and is of this class again.
    generate(mesh.b, "again", prompt)
    mesh.run()
    assert mesh.b.finished["again"].numerics == OURS
    assert mesh.b.finished["again"].usage.cached_tokens == 0


def test_what_was_matched_stays_cache_and_nothing_is_added_to_it(mesh: ClassMesh) -> None:
    prompt = prompt_of(40)
    generate(mesh.b, "warm", prompt[:17])
    mesh.run()
    cached = mesh.cached

    finished = mesh.receive("r", prompt, LOOSE.name, end=32)

    assert finished.numerics == Numerics(MIXED) and finished.usage.cached_tokens == 16
    assert mesh.cached == cached


def test_where_all_is_matched_nothing_comes_from_another_class(mesh: ClassMesh) -> None:
    prompt = prompt_of(20)
    generate(mesh.b, "warm", prompt)
    mesh.run()

    granted = grant_for(mesh.b, "r", prompt, 16)
    receive(mesh.b, "r", granted, 16, numerics="")
    mesh.run()

    assert granted.grant.matched == 16 and mesh.b.finished["r"].numerics == OURS


@pytest.mark.parametrize("mesh", [LOOSE, Numerics()], indirect=True, ids=["loose", "unnamed"])
def test_an_engine_that_promises_nothing_caches_what_it_gets(mesh: ClassMesh) -> None:
    finished = mesh.receive("r", prompt_of(20), OURS.name, end=16)

    assert finished.numerics == Numerics(MIXED)
    assert mesh.cached == (20 + 5) // 4


@pytest.mark.parametrize(("numerics", "committed"), [(OURS.name, 20), (LOOSE.name, 8), ("", 8)])
def test_a_commit_keeps_of_another_class_only_what_was_there(
    mesh: ClassMesh, numerics: str, committed: int
) -> None:
    prompt = prompt_of(22)
    generate(mesh.b, "warm", prompt[:8])
    mesh.run()
    cached = mesh.cached
    granted, call = grant_for(mesh.b, "r", prompt, 22), mesh.call()
    assert granted.grant.matched == 8

    message = wire.Commit(call, "r", granted.grant.grant_id, 60.0, numerics=numerics)
    mesh.b.core.actions.commit(ROUTER, message, mesh.now)
    send(mesh.a, "r", prompt, granted, 0, 22)
    mesh.run()

    assert mesh.b.replies[call] == wire.Committed(call, committed)
    assert mesh.cached == cached + (committed - 8) // 4


def test_one_that_lost_its_blocks_computes_all_of_them_and_its_tokens_stay_mixed() -> None:
    """Preempted, it is computed again from its tokens: those blocks are the engine's own and become cache."""
    mesh = ClassMesh(OURS, num_blocks=24)
    prompt = prompt_of(20)
    granted = grant_for(mesh.b, "r", prompt, 16)
    send(mesh.a, "r", prompt, granted, 0, 16)
    receive(mesh.b, "r", granted, 16, numerics=LOOSE.name)
    while not mesh.b.tokens.get("r"):
        mesh.now += 0.001
        mesh.a.step(), mesh.b.step()
    preempt(mesh.b)
    mesh.run()

    assert mesh.b.tokens["r"] == expect(prompt)
    finished = mesh.b.finished["r"]
    assert finished.usage.num_preemptions == 1 and finished.numerics == Numerics(MIXED)
    assert mesh.cached == (20 + 5) // 4
    mesh.close()


def preempt(engine: Engine) -> None:
    """As if another sequence had needed its blocks."""
    (sequence,) = engine.core.state.scheduler.running
    step = engine.core.stepper.next_step(engine.mesh.now)
    assert step is not None
    engine.core.state.scheduler.preempt(sequence, step)
    engine.core.state.inflight = []


@pytest.mark.parametrize("name", ["a b", "é", "x" * 65, MIXED, "none"])
def test_a_runner_of_an_impossible_class_makes_no_core(name: str) -> None:
    with pytest.raises(InternalError):
        ClassMesh(Numerics(name))
