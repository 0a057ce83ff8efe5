"""Two engine cores in one process, exchanging KV through real heaps, with a model that proves every read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microserve.kvcache.heap.memory import MemoryHeap, MemoryRegistry
from microserve.protocol import actions as wire
from microserve.protocol.errors import (
    CacheFull,
    DeadlineExceeded,
    InvalidInterval,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    UnknownRequest,
)
from microserve.protocol.sampling import SamplingParams
from microserve.services.engine.batch import Batch, StepResult
from microserve.services.engine.core import EngineCore
from microserve.services.engine.state import Limits
from microserve.services.simulation.hash_runner import HashRunner, expected_tokens, hash_layout

VOCAB = 500
ROUTER = b"router"
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


class Engine:
    """One core and what its router would have collected."""

    def __init__(self, mesh: Mesh, name: str, incarnation: int, **options: int) -> None:
        num_blocks = options.get("num_blocks", 64)
        layout = hash_layout(num_blocks=num_blocks)
        self.mesh = mesh
        heap = MemoryHeap(
            layout, incarnation=incarnation, registry=mesh.registry, num_slots=options.get("num_slots", 8)
        )
        self.runner = HashRunner(heap.data, layout, vocab_size=VOCAB)
        self.core = EngineCore(
            engine_id=name,
            incarnation=incarnation,
            model="hash",
            heap=heap,
            runner=self.runner,
            limits=Limits(
                max_model_len=200,
                vocab_size=VOCAB,
                num_blocks=num_blocks,
                max_waiting=options.get("max_waiting", 32),
                eos_token_ids=frozenset({0}),
            ),
            max_num_seqs=options.get("max_num_seqs", 8),
            max_num_batched_tokens=options.get("max_num_batched_tokens", 16),
            lease_s=5.0,
            checksums=True,
            clock=lambda: mesh.now,
            pause=lambda _: mesh.other_step(self),
        )
        self.replies: dict[int, wire.EngineReply] = {}
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, wire.Finished] = {}

    def collect(self) -> None:
        outbox, _ = self.core.take_output()
        for _, reply in outbox.replies:
            assert reply.call_id not in self.replies, "answered twice"
            self.replies[reply.call_id] = reply
        for _, delta in outbox.deltas:
            have = self.tokens.setdefault(delta.request_id, [])
            if not have and delta.offset:
                have.extend([-1] * delta.offset)  # tokens that reached the router another way
            assert delta.offset == len(have), "gap or duplicate"
            have.extend(delta.token_ids)
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
        self.core.check_integrity()


class Mesh:
    def __init__(self, **options: int) -> None:
        self.now = 100.0
        self.registry = MemoryRegistry()
        self.a = Engine(self, "a", 11, **options)
        self.b = Engine(self, "b", 22, **options)
        self.calls = 0
        self._nested = False

    def call(self) -> int:
        self.calls += 1
        return self.calls

    def other_step(self, engine: Engine) -> None:
        """While one engine waits inside a step, the other goes on."""
        self.now += 0.001

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


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    mesh = Mesh()
    yield mesh
    mesh.close()


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]


def generate(engine: Engine, request_id: str, prompt: list[int], params: SamplingParams = GREEDY) -> None:
    mesh = engine.mesh
    message = wire.StartGenerate(mesh.call(), request_id, 0, params, 60.0)
    engine.core.actions.start_generate(ROUTER, message, prompt, mesh.now)


def expect(prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    return expected_tokens(prompt, params, vocab_size=VOCAB)


def grant_for(engine: Engine, request_id: str, prompt: list[int], end: int) -> wire.Granted:
    message = wire.PrepRecv(engine.mesh.call(), request_id, end, 60.0)
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
) -> int:
    call = engine.mesh.call()
    message = wire.RemoteSend(call, request_id, begin, end, granted.grant, lane, 60.0, sampling)
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
) -> None:
    message = wire.StartGenerate(
        engine.mesh.call(), request_id, begin, params, 60.0, granted.grant.grant_id, await_first
    )
    engine.core.actions.start_generate(ROUTER, message, None, engine.mesh.now)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 17, 50])
@pytest.mark.parametrize("sampled", [False, True])
def test_one_engine_gives_the_tokens_of_a_lone_run(mesh: Mesh, length: int, sampled: bool) -> None:
    params = SamplingParams(max_tokens=9, temperature=1.0 if sampled else 0.0, seed=7, ignore_eos=True)
    prompt = prompt_of(length)
    for round_number in range(3):  # the second and third time from the prefix cache
        generate(mesh.a, f"r{round_number}", prompt, params)
        mesh.run()

        assert expect(prompt, params) == mesh.a.tokens[f"r{round_number}"]
        assert mesh.a.finished[f"r{round_number}"].reason == "length"
    assert length // 4 * 4 == mesh.a.finished["r2"].usage.cached_tokens


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 17])
def test_every_split_is_exact(length: int) -> None:
    prompt = prompt_of(length)
    borders = sorted({0, 1, 3, 4, 5, 7, 8, 9, length - 1, length} & set(range(length + 1)))
    for end in borders:
        for cached_here in {0, length // 2 // 4 * 4, length // 4 * 4}:
            for cached_there in {0, length // 2 // 4 * 4, length // 4 * 4}:
                mesh = Mesh()
                for engine, cached in ((mesh.b, cached_here), (mesh.a, cached_there)):
                    if cached:
                        generate(engine, "warm", prompt[:cached])
                        mesh.run()
                granted = grant_for(mesh.b, "r", prompt, end)
                matched = granted.grant.matched
                assert min(cached_here, end // 4 * 4) == matched
                first_there = end == length and matched < end
                receive(mesh.b, "r", granted, end, await_first=first_there)
                if matched < end:
                    call = send(
                        mesh.a, "r", prompt, granted, matched, end, sampling=GREEDY if first_there else None
                    )
                mesh.run()
                got = mesh.b.tokens["r"]
                if first_there:
                    sent = mesh.a.replies[call]
                    assert isinstance(sent, wire.Sent) and sent.first_token is not None
                    assert got[0] == -1
                    got = [sent.first_token, *got[1:]]

                assert expect(prompt) == got
                mesh.close()


@given(
    seed=st.integers(0, 1 << 30),
    length=st.integers(2, 60),
    cut=st.floats(0, 1),
    cached=st.integers(0, 15),
)
@settings(max_examples=60, deadline=None)
def test_two_senders_may_share_a_grant(seed: int, length: int, cut: float, cached: int) -> None:
    mesh = Mesh()
    prompt = prompt_of(length, seed)
    if cached:
        generate(mesh.b, "warm", prompt[: cached * 4])
        mesh.run()
    granted = grant_for(mesh.b, "r", prompt, length)
    middle = granted.grant.matched + int((length - granted.grant.matched) * cut)
    receive(mesh.b, "r", granted, length)
    send(mesh.a, "r", prompt, granted, middle, length, lane=1)
    send(mesh.b, "r", prompt, granted, 0, middle, lane=0)  # an engine may send to itself
    mesh.run()

    assert expect(prompt) == mesh.b.tokens["r"]
    mesh.close()


def test_a_receiver_starts_layer_by_layer_behind_its_sender(mesh: Mesh) -> None:
    prompt = prompt_of(15)
    granted = grant_for(mesh.b, "r", prompt, 9)
    receive(mesh.b, "r", granted, 9)
    send(mesh.a, "r", prompt, granted, 0, 9)
    on_layer = mesh.a.runner.execute
    seen: list[str] = []

    def execute(batch, hook):  # type: ignore[no-untyped-def]
        def hooked(layer: int) -> None:
            hook(layer)
            if layer == 0:
                # The first layer is in, the second is not: the receiver may begin.
                with mesh.b.core.lock:
                    plan = mesh.b.core.stepper.next_plan(mesh.now)
                assert plan is not None and plan.early is not None
                seen.append(plan.early.request_id)
                mesh.b.core.state.inflight = []
                # Put it back: this thread cannot compute both at once.
                sequence = plan.early
                mesh.b.core.state.scheduler.remove(sequence)
                sequence.num_computed = 0
                mesh.b.core.state.receiving.append(sequence)

        return on_layer(batch, hooked)

    mesh.a.runner.execute = execute  # type: ignore[method-assign]
    mesh.run()

    assert seen == ["r"]
    assert expect(prompt) == mesh.b.tokens["r"]


def test_a_commit_makes_the_context_cache(mesh: Mesh) -> None:
    prompt = prompt_of(22)
    granted = grant_for(mesh.b, "r", prompt, 22)
    send(mesh.a, "r", prompt, granted, 0, 22)
    call = mesh.call()
    mesh.b.core.actions.commit(ROUTER, wire.Commit(call, "r", granted.grant.grant_id, 60.0), mesh.now)
    mesh.run()
    committed = mesh.b.replies[call]
    assert isinstance(committed, wire.Committed)
    assert committed.num_tokens == 20

    computed = mesh.b.runner.num_tokens
    generate(mesh.b, "r", prompt)
    mesh.run()
    assert expect(prompt) == mesh.b.tokens["r"]
    assert 2 + GREEDY.max_tokens - 1 == mesh.b.runner.num_tokens - computed


def test_preemption_neither_loses_nor_repeats_a_token() -> None:
    mesh = Mesh(num_blocks=16)
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    prompts = {f"r{i}": prompt_of(9 + i, seed=i) for i in range(4)}
    for request_id, prompt in prompts.items():
        generate(mesh.a, request_id, prompt, params)
    mesh.run(limit=5000)

    for request_id, prompt in prompts.items():
        assert expect(prompt, params) == mesh.a.tokens[request_id]
    assert mesh.a.core.state.counters["preemptions"] > 0
    mesh.close()


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_interleaving_is_exact_and_leaks_nothing(data: st.DataObject) -> None:
    """Random requests, plans and aborts on two small engines: every finished answer is right."""
    mesh = Mesh(num_blocks=data.draw(st.sampled_from([20, 40, 64])), num_slots=4)
    rng = random.Random(data.draw(st.integers(0, 1 << 30)))
    stems = [prompt_of(40, seed=s) for s in range(2)]
    wanted: dict[str, tuple[Engine, list[int], SamplingParams, int | None]] = {}
    first_calls: dict[str, tuple[Engine, int]] = {}
    aborted: set[str] = set()
    for number in range(data.draw(st.integers(1, 12))):
        request_id = f"r{number}"
        prompt = stems[rng.randrange(2)][: rng.randrange(1, 40)] + prompt_of(rng.randrange(0, 8), seed=number)
        params = SamplingParams(
            max_tokens=rng.randrange(1, 12), temperature=rng.choice([0.0, 1.0]), seed=number, ignore_eos=True
        )
        here, there = (mesh.a, mesh.b) if rng.random() < 0.5 else (mesh.b, mesh.a)
        if rng.random() < 0.1:
            there = here
        try:
            if rng.random() < 0.4:
                generate(here, request_id, prompt, params)
            else:
                end = rng.choice([len(prompt), rng.randrange(len(prompt) + 1)])
                granted = grant_for(here, request_id, prompt, end)
                await_first = end == len(prompt) and granted.grant.matched < end and rng.random() < 0.7
                receive(here, request_id, granted, end, params, await_first=await_first)
                if granted.grant.matched < end:
                    call = send(
                        there, request_id, prompt, granted, 0, end, sampling=params if await_first else None
                    )
                    if await_first:
                        first_calls[request_id] = (there, call)
            wanted[request_id] = (here, prompt, params, None)
        except (CacheFull, QueueFull, PromptTooLong):
            aborted.add(request_id)
        for _ in range(rng.randrange(4)):
            mesh.now += 0.001
            rng.choice([mesh.a, mesh.b]).step()
        if rng.random() < 0.2:
            engine = rng.choice([mesh.a, mesh.b])
            victim = f"r{rng.randrange(number + 1)}"
            aborted.add(victim)
            engine.core.actions.abort(ROUTER, wire.Abort(mesh.call(), victim), mesh.now)
            engine.collect()
    for victim in aborted:  # a router's abort reaches every engine in the end
        for engine in (mesh.a, mesh.b):
            engine.core.actions.abort(ROUTER, wire.Abort(mesh.call(), victim), mesh.now)
    mesh.run(limit=5000)

    for request_id, (engine, prompt, params, _) in wanted.items():
        finished = engine.finished.get(request_id)
        if request_id in aborted:
            continue
        assert finished is not None and finished.reason == "length", finished
        got = engine.tokens[request_id]
        if (got and got[0] == -1) or (not got and request_id in first_calls):
            sender, call = first_calls[request_id]
            sent = sender.replies[call]
            assert isinstance(sent, wire.Sent) and sent.first_token is not None
            got = [sent.first_token, *got[1:]]
        assert expect(prompt, params) == got
    mesh.close()


def test_an_abort_in_each_phase_frees_everything(mesh: Mesh) -> None:
    prompt = prompt_of(40)
    for steps in range(8):
        granted = grant_for(mesh.b, "r", prompt, 40)
        receive(mesh.b, "r", granted, 40, await_first=True)
        send(mesh.a, "r", prompt, granted, 0, 40, sampling=GREEDY)
        for _ in range(steps):
            mesh.now += 0.001
            mesh.a.step()
            mesh.b.step()
        for engine in (mesh.a, mesh.b):
            engine.core.actions.abort(ROUTER, wire.Abort(mesh.call(), "r"), mesh.now)
        mesh.run()
        for engine in (mesh.a, mesh.b):
            engine.assert_clean()
            assert len(engine.core.state.records) == 0
            engine.core.memory.cache.clear()
            engine.collect()
        mesh.b.finished.clear()
        mesh.b.tokens.clear()


@pytest.mark.parametrize("role", ["sender", "receiver", "local"])
@pytest.mark.parametrize("at_layer", [0, 1])
def test_an_abort_during_a_step_is_done_at_its_end(mesh: Mesh, role: str, at_layer: int) -> None:
    prompt = prompt_of(40)
    if role == "local":
        generate(mesh.a, "r", prompt)
    else:
        granted = grant_for(mesh.b, "r", prompt, 40)
        receive(mesh.b, "r", granted, 40)
        send(mesh.a, "r", prompt, granted, 0, 40)
    victim = mesh.b if role == "receiver" else mesh.a
    execute = mesh.a.runner.execute

    def interrupted(batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult:
        def hook(layer: int) -> None:
            if layer == at_layer:
                victim.core.actions.abort(ROUTER, wire.Abort(mesh.call(), "r"), mesh.now)
            if on_layer is not None:
                on_layer(layer)

        return execute(batch, hook)

    mesh.a.runner.execute = interrupted  # type: ignore[method-assign]
    assert mesh.a.step()
    mesh.a.runner.execute = execute  # type: ignore[method-assign]
    victim.collect()

    assert victim.core.state.num_requests == 0
    assert victim.core.memory.pool.num_used == 0
    if role == "receiver":
        # Before its first put the writer holds nothing; after it, the blocks wait until it sees the closed grant.
        assert victim.core.memory.pool.num_quarantined == (10 if at_layer else 0)
        mesh.run()
        assert "transfer_failed" in str(mesh.a.replies)
    mesh.now += 100.0
    mesh.run()
    mesh.a.assert_clean()
    mesh.b.assert_clean()


def test_a_lost_router_takes_its_requests_along(mesh: Mesh) -> None:
    prompt = prompt_of(30)
    granted = grant_for(mesh.b, "r", prompt, 20)
    receive(mesh.b, "r", granted, 20)
    generate(mesh.b, "q", prompt_of(10, seed=5))
    mesh.b.step()
    mesh.b.core.state.drop_owner(ROUTER, mesh.now)
    mesh.run()

    mesh.b.assert_clean()
    assert len(mesh.b.core.state.records) == 0


def test_a_lease_ends_what_nobody_consumes(mesh: Mesh) -> None:
    grant_for(mesh.b, "r", prompt_of(30), 20)
    assert mesh.b.core.memory.pool.num_used == 5
    mesh.now += 6.0
    mesh.run()

    mesh.b.assert_clean()


def test_a_deadline_ends_what_waits_for_kv(mesh: Mesh) -> None:
    prompt = prompt_of(30)
    granted = grant_for(mesh.b, "r", prompt, 20)
    receive(mesh.b, "r", granted, 20)
    mesh.now += 61.0
    mesh.run()

    assert DeadlineExceeded.code == mesh.b.finished["r"].code
    mesh.b.assert_clean()


def test_a_failed_send_fails_its_receiver_at_once(mesh: Mesh) -> None:
    prompt = prompt_of(60)
    granted = grant_for(mesh.b, "r", prompt, 60)
    receive(mesh.b, "r", granted, 60)
    send(mesh.a, "r", prompt, granted, 0, 60)
    mesh.a.step()
    mesh.a.core.actions.abort(ROUTER, wire.Abort(mesh.call(), "r"), mesh.now)
    mesh.now += 1.0
    mesh.run()

    assert mesh.b.finished["r"].code == "transfer_failed"
    mesh.b.assert_clean()


def test_calls_are_idempotent(mesh: Mesh) -> None:
    prompt = prompt_of(30)
    first, second = grant_for(mesh.b, "r", prompt, 20), grant_for(mesh.b, "r", prompt, 20)
    assert first.grant == second.grant
    send(mesh.a, "r", prompt, first, 0, 20)
    mesh.run()
    call = send(mesh.a, "r", prompt, first, 0, 20)
    sent = mesh.a.replies[call]
    assert isinstance(sent, wire.Sent) and sent.sent == 20
    for _ in range(2):
        done = mesh.b.core.actions.abort(ROUTER, wire.Abort(mesh.call(), "r"), mesh.now)
        assert isinstance(done, wire.Done)


def test_misuse_is_a_clear_error(mesh: Mesh) -> None:
    actions, prompt = mesh.a.core.actions, prompt_of(10)
    with pytest.raises(UnknownRequest):
        actions.prep_recv(ROUTER, wire.PrepRecv(1, "new", 5, 1.0), None, mesh.now)
    with pytest.raises(InvalidInterval, match="end"):
        actions.prep_recv(ROUTER, wire.PrepRecv(1, "r", 11, 1.0), prompt, mesh.now)
    with pytest.raises(InvalidRequest, match="empty"):
        actions.prep_recv(ROUTER, wire.PrepRecv(1, "r2", 0, 1.0), [], mesh.now)
    with pytest.raises(InvalidRequest, match="token id"):
        actions.prep_recv(ROUTER, wire.PrepRecv(1, "r3", 0, 1.0), [VOCAB], mesh.now)
    with pytest.raises(PromptTooLong):
        actions.prep_recv(ROUTER, wire.PrepRecv(1, "r4", 300, 1.0), prompt_of(300), mesh.now)
    with pytest.raises(InvalidInterval, match="begin"):
        actions.start_generate(ROUTER, wire.StartGenerate(1, "r5", 3, GREEDY, 1.0), prompt, mesh.now)
    with pytest.raises(InvalidRequest, match="ttl_s"):
        actions.start_generate(ROUTER, wire.StartGenerate(1, "r6", 0, GREEDY, float("nan")), prompt, mesh.now)
    granted = grant_for(mesh.b, "g", prompt, 8)
    with pytest.raises(InvalidInterval, match="grant's end"):
        receive(mesh.b, "g", granted, 7)
    with pytest.raises(InvalidInterval):
        send(mesh.a, "g", prompt, granted, 0, 9)


def test_a_full_pool_is_an_error_not_a_wait() -> None:
    mesh = Mesh(num_blocks=16)
    grant_for(mesh.b, "r1", prompt_of(24), 24)
    with pytest.raises(CacheFull):
        grant_for(mesh.b, "r2", prompt_of(20, seed=1), 20)
    with pytest.raises(PromptTooLong):
        grant_for(mesh.b, "r4", prompt_of(32, seed=1), 32)
    generate(mesh.b, "r3", prompt_of(20, seed=2))
    mesh.run()
    assert expect(prompt_of(20, seed=2)) == mesh.b.tokens["r3"]
    mesh.close()
