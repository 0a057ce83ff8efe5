"""An engine that drains: what it refuses, what it still sends, and when it may leave."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.protocol.errors import Draining
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.actions import MOVE_S
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

BLOCK = 4
SEEDED = SamplingParams(max_tokens=30, temperature=1.0, seed=7, logprobs=0, ignore_eos=True)


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    mesh = Mesh()
    yield mesh
    mesh.close()


def abort(engine: Engine, request_id: str) -> None:
    engine.core.actions.abort(ROUTER, wire.Abort(engine.mesh.call(), request_id), engine.mesh.now)


def is_drained(engine: Engine) -> bool:
    return engine.core.state.is_drained(engine.mesh.now)


def known_tokens(engine: Engine, request_id: str, prompt: list[int]) -> list[int]:
    return prompt + engine.tokens.pop(request_id)


def movable(tokens: list[int]) -> int:
    """Whole blocks of what has KV: all but the newest token."""
    return (len(tokens) - 1) // BLOCK * BLOCK


def go_on(engine: Engine, granted: wire.Granted, tokens: list[int], prompt: list[int]) -> None:
    """Continue a stream from a grant, as its router would."""
    message = wire.StartGenerate(
        engine.mesh.call(),
        "r",
        granted.grant.end,
        SEEDED,
        60.0,
        granted.grant.grant_id,
        num_output_tokens=len(tokens) - len(prompt),
    )
    engine.core.actions.start_generate(ROUTER, message, None, engine.mesh.now)


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 40), num_steps=st.integers(1, 12))
def test_a_running_context_moves_with_its_kv_and_goes_on_with_the_same_tokens(
    length: int, num_steps: int
) -> None:
    mesh, prompt = Mesh(), prompt_of(length)
    generate(mesh.a, "r", prompt, SEEDED)
    while len(mesh.a.tokens.get("r", [])) < num_steps:
        mesh.now += 0.001
        mesh.a.step()
    mesh.a.core.state.draining = True
    assert not is_drained(mesh.a)

    tokens = known_tokens(mesh.a, "r", prompt)
    abort(mesh.a, "r")
    assert not is_drained(mesh.a)  # its router is about to come for it
    end = movable(tokens)
    if end:
        message = wire.PrepRecv(mesh.call(), "r", end, 60.0)
        granted = mesh.b.core.actions.prep_recv(ROUTER, message, tokens, mesh.now)
        call = send(mesh.a, "r", tokens, granted, 0, end)
        go_on(mesh.b, granted, tokens, prompt)
        mesh.run()
        sent = mesh.a.replies[call]
        assert isinstance(sent, wire.Sent)
        assert (sent.computed, sent.cached, sent.sent) == (0, end, end)
        assert is_drained(mesh.a)
        assert tokens + mesh.b.tokens["r"][len(tokens) - len(prompt) :] == prompt + expect(prompt, SEEDED)
        assert mesh.b.finished["r"].usage.received_tokens == end
    mesh.close()


def test_a_move_asked_for_during_the_last_step_computes_nothing(mesh: Mesh) -> None:
    prompt = prompt_of(21)
    generate(mesh.a, "r", prompt, SEEDED)
    for _ in range(8):
        mesh.a.step()
    tokens = known_tokens(mesh.a, "r", prompt)
    mesh.a.core.state.draining = True
    execute = mesh.a.runner.execute
    calls: list[int] = []

    def interrupted(*args: object) -> object:
        mesh.a.runner.execute = execute  # type: ignore[method-assign]
        abort(mesh.a, "r")
        granted = grant_for(mesh.b, "r", tokens, movable(tokens))
        calls.append(send(mesh.a, "r", tokens, granted, 0, movable(tokens)))
        go_on(mesh.b, granted, tokens, prompt)
        return execute(*args)  # type: ignore[arg-type]

    mesh.a.runner.execute = interrupted  # type: ignore[method-assign,assignment]
    mesh.run()
    sent = mesh.a.replies[calls[0]]

    assert isinstance(sent, wire.Sent) and sent.computed == 0
    assert prompt + expect(prompt, SEEDED) == tokens + mesh.b.tokens["r"][len(tokens) - len(prompt) :]
    assert is_drained(mesh.a)


def test_new_work_is_refused_and_begun_work_goes_on(mesh: Mesh) -> None:
    prompt = prompt_of(12)
    begun = grant_for(mesh.a, "begun", prompt, 8)
    mesh.a.core.state.draining = True
    with pytest.raises(Draining):
        grant_for(mesh.a, "new", prompt, 8)
    with pytest.raises(Draining):
        generate(mesh.a, "new", prompt)
    assert not is_drained(mesh.a)

    receive(mesh.a, "begun", begun, 8)
    call = send(mesh.b, "begun", prompt, begun, 0, 8)
    mesh.run()
    assert isinstance(mesh.b.replies[call], wire.Sent)
    assert mesh.a.tokens["begun"] == expect(prompt)
    assert is_drained(mesh.a)


def test_it_sends_what_it_never_had(mesh: Mesh) -> None:
    """A context may have been evicted, or never been computed here: the send computes it."""
    prompt = prompt_of(30)
    mesh.a.core.state.draining = True
    granted = grant_for(mesh.b, "r", prompt, 28)
    call = send(mesh.a, "r", prompt, granted, 0, 28)
    receive(mesh.b, "r", granted, 28)
    mesh.run()
    sent = mesh.a.replies[call]
    assert isinstance(sent, wire.Sent) and sent.computed == 28
    assert mesh.b.tokens["r"] == expect(prompt)


def test_what_nobody_comes_for_is_awaited_only_so_long(mesh: Mesh) -> None:
    generate(mesh.a, "r", prompt_of(9))
    mesh.a.step()
    mesh.a.core.state.draining = True
    abort(mesh.a, "r")
    mesh.now += MOVE_S - 0.01
    assert not is_drained(mesh.a)
    mesh.now += 0.02
    assert is_drained(mesh.a)


def test_a_second_abort_says_that_nobody_will_come(mesh: Mesh) -> None:
    generate(mesh.a, "r", prompt_of(9))
    mesh.a.step()
    mesh.a.core.state.draining = True
    abort(mesh.a, "r")
    assert not is_drained(mesh.a)
    abort(mesh.a, "r")
    assert is_drained(mesh.a)


def test_nothing_is_awaited_of_what_has_computed_nothing_or_of_a_lost_router(mesh: Mesh) -> None:
    generate(mesh.a, "computed", prompt_of(9))
    mesh.a.step()
    generate(mesh.a, "waits", prompt_of(9, seed=1))
    mesh.a.core.state.draining = True
    abort(mesh.a, "waits")
    mesh.a.core.state.drop_owner(ROUTER, mesh.now)
    assert is_drained(mesh.a)


def test_quarantined_blocks_keep_it(mesh: Mesh) -> None:
    """A sender that has claimed its lane may still write: the heap must outlive it."""
    prompt = prompt_of(40)
    granted = grant_for(mesh.a, "r", prompt, 40)
    call = send(mesh.b, "r", prompt, granted, 0, 40)
    mesh.b.step()
    mesh.a.core.state.draining = True
    abort(mesh.a, "r")
    assert mesh.a.core.memory.pool.num_quarantined
    assert not is_drained(mesh.a)
    mesh.run()
    assert call in mesh.b.replies
    mesh.a.step()
    assert is_drained(mesh.a)


def test_what_runs_to_its_end_leaves_a_drained_engine(mesh: Mesh) -> None:
    prompt = prompt_of(10)
    generate(mesh.a, "r", prompt, GREEDY)
    mesh.a.step()
    mesh.a.core.state.draining = True
    mesh.run()
    assert mesh.a.tokens["r"] == expect(prompt)
    assert is_drained(mesh.a)
