"""Two engine cores in one process on memory heaps, stepped by hand: the rig of the core's tests.

Other heaps and runners: override ``Mesh.equip``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from itertools import product

from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.heap.local import MemoryHeap, MemoryRegistry
from microserve.kvcache.layout import KvLayout
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.grant import MAX_LANES
from microserve.protocol.messages.request.prompt_logprobs import PromptLogprobs
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Runner
from microserve.services.engine.core.checks import Limits
from microserve.services.engine.core.coding.choice import CodecOptions
from microserve.services.engine.core.core import EngineCore
from microserve.services.engine.guidance.guide import Guides
from microserve.services.simulation.engine.hash_runner import HashRunner, expected_tokens, hash_layout

VOCAB = 500
ROUTER = b"router"
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


class Engine:
    """One core and what its router would have collected."""

    def __init__(self, mesh: Mesh, name: str, incarnation: int, **options: int) -> None:
        num_blocks = options.get("num_blocks", 64)
        layout = hash_layout(
            num_blocks=num_blocks, block_size=options.get("block_size", 4), width=options.get("width", 1)
        )
        self.mesh = mesh
        self.heap, runner, compute_stream = mesh.equip(layout, incarnation, options.get("num_slots", 8))
        if isinstance(runner, HashRunner):
            self.runner = runner
        self.core = EngineCore(
            engine_id=name,
            incarnation=incarnation,
            model="hash",
            heap=self.heap,
            runner=runner,
            limits=Limits(
                max_model_len=options.get("max_model_len", 200),
                vocab_size=VOCAB,
                num_blocks=num_blocks,
                max_waiting=options.get("max_waiting", 32),
                eos_token_ids=frozenset({0}),
            ),
            max_num_seqs=options.get("max_num_seqs", 8),
            max_num_batched_tokens=options.get("max_num_batched_tokens", 16),
            lease_s=5.0,
            checksums=mesh.checksums,
            compute_stream=compute_stream,
            clock=lambda: mesh.now,
            pause=lambda _: mesh.other_step(self),
            guides=mesh.guides,
            codecs=mesh.codecs,
        )
        self.replies: dict[int, wire.EngineReply] = {}
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[wire.TokenLogprob]] = {}
        self.finished: dict[str, wire.Finished] = {}
        self.rows: dict[str, PromptLogprobs] = {}
        """Of prompts; joining says where one is missing or comes twice."""

    def collect(self) -> None:
        outbox, _ = self.core.take_output()
        for _, reply in outbox.replies:
            assert not isinstance(reply, wire.Deltas | wire.Heartbeat)
            assert reply.call_id not in self.replies, "answered twice"
            self.replies[reply.call_id] = reply
        for _, delta in outbox.deltas:
            have = self.tokens.setdefault(delta.request_id, [])
            if not have and delta.offset:
                have.extend([-1] * delta.offset)  # tokens that reached the router another way
            assert delta.offset == len(have), "gap or duplicate"
            if delta.prompt is not None:
                assert not have, "a token came before its prompt's rows"
                rows = self.rows.get(delta.request_id, PromptLogprobs(1, delta.prompt.num_top, b""))
                self.rows[delta.request_id] = rows.joined(delta.prompt)
            have.extend(delta.token_ids)
            self.logprobs.setdefault(delta.request_id, []).extend(delta.logprobs)
            if delta.finished is not None:
                assert delta.request_id not in self.finished, "two ends"
                self.finished[delta.request_id] = delta.finished

    def step(self) -> bool:
        stepped = self.core.step()
        self.collect()
        self.core.check_integrity()
        return stepped

    def assert_clean(self) -> None:
        pool = self.core.memory.pool
        assert pool.num_used == 0
        assert pool.num_quarantined == 0
        assert pool.num_free == pool.num_blocks
        assert not self.core.state.num_requests
        assert not self.core.memory.is_departing
        num_slots = self.heap.words.num_slots
        assert not [at for at in product(range(num_slots), range(MAX_LANES)) if self.heap.is_held(*at)]
        self.core.check_integrity()


class Mesh:
    checksums = True
    lanes_linger = False
    """A send may be refused a lane that its last writer has not quite left: a router would try again."""

    guides: Guides | None = None
    codecs: CodecOptions | None = None

    def __init__(self, **options: int) -> None:
        self.now = 100.0
        self.registry = MemoryRegistry()
        self.a = Engine(self, "a", 11, **options)
        self.b = Engine(self, "b", 22, **options)
        self.calls = 0
        self.arrived: Callable[[], None] | None = None
        """Called once, in the next wait inside a step."""

    def equip(self, layout: KvLayout, incarnation: int, num_slots: int) -> tuple[Heap, Runner, int | None]:
        """An engine's heap, what computes on it, and in which stream."""
        heap = MemoryHeap(layout, incarnation=incarnation, registry=self.registry, num_slots=num_slots)
        return heap, HashRunner(heap.data, layout, vocab_size=VOCAB), None

    def call(self) -> int:
        self.calls += 1
        return self.calls

    def other_step(self, engine: Engine) -> None:
        """While an engine waits inside a step, time passes and requests may arrive."""
        self.now += 0.001
        if self.arrived is not None:
            arrived, self.arrived = self.arrived, None
            arrived()

    def run(self, limit: int = 2000) -> None:
        """Step both until neither can."""
        for _ in range(limit):
            self.now += 0.001
            if not self.a.step() | self.b.step():
                return
        raise AssertionError("the mesh does not come to rest")

    def close(self) -> None:
        for engine in (self.a, self.b):
            for record in engine.core.state.records:
                engine.core.state.abort(record, self.now)
        self.now += 1000.0
        self.run()
        for engine in (self.a, self.b):
            engine.assert_clean()
        self.a.core.close()
        self.b.core.close()


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]


def generate(engine: Engine, request_id: str, prompt: list[int], params: SamplingParams = GREEDY) -> None:
    mesh = engine.mesh
    message = wire.StartGenerate(mesh.call(), request_id, 0, params, 60.0)
    engine.core.actions.start_generate(ROUTER, message, prompt, mesh.now)


def expect(
    prompt: list[int], params: SamplingParams = GREEDY, *, block_size: int = 4, width: int = 1
) -> list[int]:
    if params == GREEDY:
        return list(_greedy(tuple(prompt), block_size, width))
    return expected_tokens(prompt, params, vocab_size=VOCAB, block_size=block_size, width=width)


@cache
def _greedy(prompt: tuple[int, ...], block_size: int, width: int) -> tuple[int, ...]:
    """Asked for again and again by tests that cut one prompt in many ways."""
    return tuple(expected_tokens(prompt, GREEDY, vocab_size=VOCAB, block_size=block_size, width=width))


def grant_for(
    engine: Engine, request_id: str, prompt: list[int], end: int, *, may_lose: bool = False
) -> wire.Granted:
    message = wire.PrepRecv(engine.mesh.call(), request_id, end, 60.0, may_lose=may_lose)
    return engine.core.actions.prep_recv(ROUTER, message, prompt, engine.mesh.now)


def send(
    engine: Engine,
    request_id: str,
    prompt: list[int],
    granted: wire.Granted,
    begin: int,
    end: int,
    *,
    lane: int = 0,
    sampling: SamplingParams | None = None,
    codec: str = "",
    may_lose: bool = False,
) -> int:
    call = engine.mesh.call()
    message = wire.RemoteSend(
        *(call, request_id, begin, end, granted.grant, lane, 60.0, sampling), codec=codec, may_lose=may_lose
    )
    sent = engine.core.actions.remote_send(ROUTER, message, prompt, engine.mesh.now)
    if sent is not None:
        engine.replies[call] = sent
    return call


def receive(
    engine: Engine,
    request_id: str,
    granted: wire.Granted,
    begin: int,
    params: SamplingParams = GREEDY,
    *,
    await_first: bool = False,
    numerics: str = "",
) -> None:
    message = wire.StartGenerate(
        *(engine.mesh.call(), request_id, begin, params, 60.0, granted.grant.grant_id, await_first),
        numerics=numerics,
    )
    engine.core.actions.start_generate(ROUTER, message, None, engine.mesh.now)
