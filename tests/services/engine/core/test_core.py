"""Two engine cores in one process, exchanging KV through real heaps, with a model that proves every read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.protocol.errors import (
    CacheFull,
    DeadlineExceeded,
    InvalidInterval,
    InvalidRequest,
    PromptTooLong,
    UnknownRequest,
)
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Batch, StepResult
from tests.support.engine.core_mesh import (
    GREEDY,
    ROUTER,
    VOCAB,
    Mesh,
    expect,
    generate,
    grant_for,
    prompt_of,
    receive,
    send,
)
from tests.support.examples import examples


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    mesh = Mesh()
    yield mesh
    mesh.close()


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


@given(
    seed=st.integers(0, 1 << 30),
    length=st.integers(2, 60),
    cut=st.floats(0, 1),
    cached=st.integers(0, 15),
)
@settings(max_examples=examples(60), deadline=None)
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
    execute = mesh.a.runner.execute
    seen: list[str] = []

    def interrupted(batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult:
        def hooked(layer: int) -> None:
            if on_layer is not None:
                on_layer(layer)
            if layer == 0:
                # The first layer is in, the second is not: the receiver may begin.
                with mesh.b.core.lock:
                    step = mesh.b.core.stepper.next_step(mesh.now)
                assert step is not None and step.early is not None
                seen.append(step.early.request_id)
                mesh.b.core.state.inflight = []
                # Put it back: this thread cannot compute both at once.
                sequence = step.early
                mesh.b.core.state.scheduler.remove(sequence)
                sequence.num_computed = 0
                mesh.b.core.state.receiving.append(sequence)

        return execute(batch, hooked)

    mesh.a.runner.execute = interrupted  # type: ignore[method-assign]
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


@pytest.mark.parametrize("split", [None, 9, 17])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_delivered", [1, 5, 11])
def test_a_stream_continues_elsewhere_with_the_same_tokens(
    mesh: Mesh, split: int | None, temperature: float, num_delivered: int
) -> None:
    """The prompt and what was delivered go to other engines; the rest is as if nothing had happened."""
    params = SamplingParams(max_tokens=12, temperature=temperature, seed=5, ignore_eos=True)
    prompt = prompt_of(17)
    whole = expect(prompt, params)
    known = prompt + whole[:num_delivered]
    if split is None:
        message = wire.StartGenerate(mesh.call(), "r", 0, params, 60.0, num_output_tokens=num_delivered)
        mesh.b.core.actions.start_generate(ROUTER, message, known, mesh.now)
    else:
        end = len(known) if split == 17 else split
        granted = grant_for(mesh.b, "r", known, end)
        first = end == len(known)
        send_message = wire.RemoteSend(
            mesh.call(),
            "r",
            0,
            end,
            granted.grant,
            0,
            60.0,
            params if first else None,
            "",
            num_delivered if first else 0,
        )
        mesh.a.core.actions.remote_send(ROUTER, send_message, known, mesh.now)
        message = wire.StartGenerate(
            mesh.call(), "r", end, params, 60.0, granted.grant.grant_id, first, num_delivered
        )
        mesh.b.core.actions.start_generate(ROUTER, message, None, mesh.now)
    mesh.run()
    got = mesh.b.tokens["r"][num_delivered:]
    if split == 17:
        sent = mesh.a.replies[send_message.call_id]
        assert isinstance(sent, wire.Sent) and sent.first_token is not None
        got = [sent.first_token, *mesh.b.tokens["r"][num_delivered + 1 :]]

    assert whole[num_delivered:] == got
    finished = mesh.b.finished["r"]
    assert (finished.reason, finished.usage.prompt_tokens, finished.usage.output_tokens) == ("length", 17, 12)


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
        # Before its first put the writer holds nothing; after it, the blocks wait until it sees the close.
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
