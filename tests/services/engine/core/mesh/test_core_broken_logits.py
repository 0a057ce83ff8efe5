"""Logits of one sequence that are no numbers end that sequence, and nothing of its share is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from microserve.protocol.errors import InternalError
from microserve.protocol.messages import engine as wire
from microserve.services.engine.core.batch import Batch, Sampled, StepResult
from tests.support.engine.core_mesh import (
    GREEDY,
    Engine,
    Mesh,
    expect,
    generate,
    grant_for,
    prompt_of,
    receive,
    send,
)

BROKEN = Sampled(-1, None, [], InternalError("the logits are not finite"))


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    mesh = Mesh()
    yield mesh
    mesh.close()


def break_logits(engine: Engine, monkeypatch: pytest.MonkeyPatch, prompt: list[int], at: int = 0) -> None:
    """Of the sequence with that prompt, when it has ``at`` output tokens."""
    execute = engine.runner.execute

    def broken(batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult:
        result = execute(batch, on_layer)
        for place, chunk in enumerate(batch.chunks):
            spec = chunk.sample
            if spec and [*spec.prompt_token_ids] == prompt and len(spec.output_token_ids) == at:
                result.sampled[place] = BROKEN
        return result

    monkeypatch.setattr(engine.runner, "execute", broken)


@pytest.mark.parametrize("at", [0, 3])
def test_the_others_of_the_step_go_on(mesh: Mesh, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    bad, good = prompt_of(9, seed=1), prompt_of(7, seed=2)
    with monkeypatch.context() as patch:
        break_logits(mesh.a, patch, bad, at)
        generate(mesh.a, "bad", bad)
        generate(mesh.a, "good", good)
        mesh.run()
    ended = mesh.a.finished["bad"]
    assert (ended.reason, ended.code) == ("error", "internal")
    assert mesh.a.tokens["bad"] == expect(bad)[:at]
    assert mesh.a.tokens["good"] == expect(good)
    mesh.a.assert_clean()

    generate(mesh.a, "again", bad)
    mesh.run()
    assert mesh.a.tokens["again"] == expect(bad)
    # Two blocks of four tokens, if a step that went well had computed them.
    assert mesh.a.finished["again"].usage.cached_tokens == (8 if at else 0)


def test_a_send_that_should_have_sampled_fails_and_so_does_its_receiver(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_of(11)
    break_logits(mesh.a, monkeypatch, prompt)
    granted = grant_for(mesh.b, "r", prompt, 11)
    receive(mesh.b, "r", granted, 11, await_first=True)
    call = send(mesh.a, "r", prompt, granted, 0, 11, sampling=GREEDY)
    mesh.run()
    mesh.now += 1.0
    mesh.run()

    failed = mesh.a.replies[call]
    assert isinstance(failed, wire.Failed)
    assert failed.code == "internal"
    assert mesh.b.finished["r"].code == "transfer_failed"
    mesh.a.assert_clean()
    mesh.b.assert_clean()
