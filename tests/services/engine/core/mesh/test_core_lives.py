"""Ids that are used again, refused work, early starts that give way: nothing of one life reaches another."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from microserve.protocol.errors import InvalidInterval, InvalidRequest, QueueFull
from microserve.protocol.messages import engine as wire
from microserve.services.engine.core.batch import Batch, StepResult
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


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    mesh = Mesh()
    yield mesh
    mesh.close()


def during_step(engine: Engine, action: Callable[[], None]) -> None:
    """Run ``action`` while the engine's next step computes its first layer."""
    execute = engine.runner.execute

    def interrupted(batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult:
        def hook(layer: int) -> None:
            if layer == 0:
                engine.runner.execute = execute  # type: ignore[method-assign]
                action()
            if on_layer is not None:
                on_layer(layer)

        return execute(batch, hook)

    engine.runner.execute = interrupted  # type: ignore[method-assign]


def abort(engine: Engine, request_id: str) -> None:
    engine.core.actions.abort(ROUTER, wire.Abort(engine.mesh.call(), request_id), engine.mesh.now)


def test_an_id_taken_up_again_in_the_step_that_ends_its_old_life(mesh: Mesh) -> None:
    prompt = prompt_of(17)
    generate(mesh.a, "r", prompt)
    mesh.a.step()
    mesh.a.step()
    mesh.a.tokens.clear()

    def again() -> None:
        abort(mesh.a, "r")
        generate(mesh.a, "r", prompt)

    during_step(mesh.a, again)
    mesh.run()

    assert expect(prompt) == mesh.a.tokens["r"]
    assert mesh.a.finished["r"].reason == "length"


def test_a_send_taken_up_again_stays_in_reach_of_its_owner(mesh: Mesh) -> None:
    prompt = prompt_of(40)
    first = grant_for(mesh.b, "r", prompt, 40)
    send(mesh.a, "r", prompt, first, 0, 40)
    mesh.a.step()

    def again() -> None:
        abort(mesh.a, "r")
        abort(mesh.b, "r")
        second = grant_for(mesh.b, "r", prompt, 40)
        send(mesh.a, "r", prompt, second, 0, 40)

    during_step(mesh.a, again)
    mesh.a.step()
    mesh.a.core.state.drop_owner(ROUTER, mesh.now)
    mesh.run()

    assert mesh.a.core.state.num_requests == 0


def test_other_tokens_under_an_id_that_works_are_refused(mesh: Mesh) -> None:
    prompt = prompt_of(30)
    generate(mesh.a, "r", prompt)
    with pytest.raises(InvalidRequest, match="other tokens"):
        generate(mesh.a, "r", [*prompt, 7])
    generate(mesh.a, "r", prompt)
    mesh.run()
    assert expect(prompt) == mesh.a.tokens["r"]


def test_refused_work_leaves_no_record() -> None:
    mesh = Mesh(max_waiting=2, max_num_seqs=1)
    for number in range(4):
        generate(mesh.a, f"w{number}", prompt_of(8, number)) if number < 2 else None
    for number in range(50):
        with pytest.raises(QueueFull):
            generate(mesh.a, f"r{number}", prompt_of(8, number))
        with pytest.raises(InvalidInterval):
            message = wire.StartGenerate(mesh.call(), f"s{number}", 3, GREEDY, 9.0)
            mesh.a.core.actions.start_generate(ROUTER, message, prompt_of(8), mesh.now)
    assert len(mesh.a.core.state.records) == 2
    mesh.run()
    mesh.close()


def test_a_first_token_that_nobody_would_bring_is_refused(mesh: Mesh) -> None:
    prompt = prompt_of(16)
    generate(mesh.b, "warm", prompt)
    mesh.run()
    granted = grant_for(mesh.b, "r", prompt, 16)
    assert granted.grant.matched == 16
    with pytest.raises(InvalidInterval, match="await_first"):
        receive(mesh.b, "r", granted, 16, await_first=True)
    with pytest.raises(InvalidInterval, match="nothing to send"):
        send(mesh.a, "r", prompt, granted, 0, 16, sampling=GREEDY)


def test_an_early_start_gives_way_to_others_and_goes_on_later(mesh: Mesh) -> None:
    prompt, other = prompt_of(15), prompt_of(6, seed=9)
    granted = grant_for(mesh.b, "r", prompt, 9)
    receive(mesh.b, "r", granted, 9)
    send(mesh.a, "r", prompt, granted, 0, 9)

    def after_first_layer(layer: int) -> None:
        if layer == 1:  # the first layer has been put, the second not yet
            mesh.arrived = lambda: generate(mesh.b, "other", other)
            assert mesh.b.step()

    execute = mesh.a.runner.execute

    def interrupted(batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult:
        def hook(layer: int) -> None:
            after_first_layer(layer)
            if on_layer is not None:
                on_layer(layer)

        return execute(batch, hook)

    mesh.a.runner.execute = interrupted  # type: ignore[method-assign]
    assert mesh.a.step()
    mesh.a.runner.execute = execute  # type: ignore[method-assign]
    assert mesh.b.core.state.counters["early_starts_put_back"] == 1
    mesh.run()

    assert expect(prompt) == mesh.b.tokens["r"]
    assert expect(other) == mesh.b.tokens["other"]
