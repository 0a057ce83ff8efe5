"""Log-probabilities of prompts: each row once and right, whatever else happens to the request."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.protocol.errors import InternalError, InvalidRequest, PromptTooLong
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.prompt_logprobs import PromptLogprobs
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core import core as core_module
from microserve.services.engine.core.batch import Batch, Scored, StepResult
from microserve.services.simulation.engine.hash_runner import expected_rows
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

SCORED = msgspec.structs.replace(GREEDY, prompt_logprobs=2)
PROMPT_ONLY = msgspec.structs.replace(SCORED, max_tokens=0)


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    mesh = Mesh()
    yield mesh
    mesh.close()


def rows_of(prompt: list[int], num_top: int = 2) -> PromptLogprobs:
    return expected_rows(prompt, num_top, vocab_size=VOCAB)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 50])
@pytest.mark.parametrize("params", [SCORED, PROMPT_ONLY])
def test_rows_are_the_same_with_a_warm_cache_as_without(
    mesh: Mesh, length: int, params: SamplingParams
) -> None:
    prompt = prompt_of(length)
    for name in ("cold", "warm"):
        generate(mesh.a, name, prompt, params)
        mesh.run()

        assert mesh.a.rows.get(name, rows_of(prompt[:1])) == rows_of(prompt)
        assert mesh.a.tokens[name] == (expect(prompt) if params.max_tokens else [])
        finished = mesh.a.finished[name]
        assert (finished.reason, finished.usage.cached_tokens) == ("length", 0)


def test_the_prompt_alone_is_computed_where_nothing_is_to_come(mesh: Mesh) -> None:
    prompt, nothing = prompt_of(16), msgspec.structs.replace(GREEDY, max_tokens=0)
    for name in ("cold", "warm"):
        generate(mesh.a, name, prompt, nothing)
        mesh.run()

    assert mesh.a.tokens == {"cold": [], "warm": []} and not mesh.a.rows
    assert mesh.a.finished["warm"].usage == wire.Usage(prompt_tokens=16, cached_tokens=16)


def test_a_prompt_as_long_as_the_context_is_scored_where_nothing_follows() -> None:
    mesh = Mesh(max_model_len=40, num_blocks=10)
    prompt = prompt_of(40)
    generate(mesh.a, "r", prompt, PROMPT_ONLY)
    mesh.run()

    assert mesh.a.rows["r"] == rows_of(prompt)
    for params, length in ((SCORED, 40), (PROMPT_ONLY, 41)):
        with pytest.raises(PromptTooLong):
            generate(mesh.a, "long", prompt_of(length), params)
    mesh.close()


@given(
    requests=st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from([None, 0, 3]), st.integers(0, 2), st.integers(0, 8)),
        min_size=1,
        max_size=6,
    ),
    num_blocks=st.sampled_from([14, 20, 64]),
    num_scored=st.sampled_from([1, 5, 1000]),
)
@settings(max_examples=80, deadline=None)
def test_company_preemption_and_chunks_leave_no_trace(
    requests: list[tuple[int, int | None, int, int]], num_blocks: int, num_scored: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core_module, "SCORED_LOGITS_NBYTES", 4 * VOCAB * num_scored)
        mesh = Mesh(num_blocks=num_blocks)
    for number, (length, num_top, seed, max_tokens) in enumerate(requests):
        params = msgspec.structs.replace(GREEDY, max_tokens=max_tokens, prompt_logprobs=num_top)
        generate(mesh.a, f"r{number}", prompt_of(length, seed), params)
        mesh.a.step()
    mesh.run()

    for number, (length, num_top, seed, max_tokens) in enumerate(requests):
        prompt, name = prompt_of(length, seed), f"r{number}"
        assert mesh.a.tokens[name] == (
            expect(prompt, msgspec.structs.replace(GREEDY, max_tokens=max_tokens)) if max_tokens else []
        )
        if num_top is None or length == 1:
            assert name not in mesh.a.rows
        else:
            assert mesh.a.rows[name] == rows_of(prompt, num_top)
    mesh.close()


def test_rows_come_as_they_are_computed_and_a_preempted_prompt_tells_none_twice() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core_module, "SCORED_LOGITS_NBYTES", 4 * VOCAB * 8)
        mesh = Mesh(num_blocks=24)
    prompt = prompt_of(40)
    generate(mesh.a, "r", prompt, SCORED)
    mesh.a.step()
    mesh.a.step()
    state = mesh.a.core.state
    [sequence] = state.scheduler.running

    assert len(mesh.a.rows["r"]) == 16
    state.memory.release(sequence, mesh.now)  # as a preemption does
    state.scheduler.remove(sequence)
    state.scheduler.add(sequence)
    sequence.num_preemptions += 1
    mesh.run()

    assert mesh.a.rows["r"] == rows_of(prompt) and mesh.a.tokens["r"] == expect(prompt)
    mesh.close()


def test_kv_of_others_is_refused(mesh: Mesh) -> None:
    prompt = prompt_of(20)
    granted = grant_for(mesh.b, "r", prompt, 20)
    with pytest.raises(InvalidRequest, match="computes all of the prompt") as refused:
        receive(mesh.b, "r", granted, 20, SCORED)
    assert refused.value.field == "prompt_logprobs"
    with pytest.raises(InvalidRequest, match="computes all of the prompt"):
        send(mesh.a, "r", prompt, granted, 0, 20, sampling=SCORED)
    message = wire.Abort(mesh.call(), "r")
    mesh.b.core.actions.abort(ROUTER, message, mesh.now)


def test_a_continued_stream_has_brought_its_rows_and_may_come_with_its_kv(mesh: Mesh) -> None:
    prompt = prompt_of(20)
    whole = expect(prompt)
    tokens = [*prompt, *whole[:3]]
    generate(mesh.a, "warm", tokens)
    mesh.run()
    message = wire.StartGenerate(mesh.call(), "r", 0, SCORED, 60.0, num_output_tokens=3)
    mesh.a.core.actions.start_generate(ROUTER, message, tokens, mesh.now)
    mesh.run()

    assert mesh.a.tokens["r"][3:] == whole[3:] and "r" not in mesh.a.rows
    assert mesh.a.finished["r"].usage.cached_tokens == 20


@pytest.mark.parametrize("is_silent", [False, True])
def test_broken_logits_end_their_own_sequence(mesh: Mesh, is_silent: bool) -> None:
    execute = mesh.a.runner.execute

    def broken(batch: Batch, on_layer: object = None) -> StepResult:
        result = execute(batch, on_layer)  # type: ignore[arg-type]
        result.scored = (
            {} if is_silent else {place: Scored(b"", 2, InternalError("broken")) for place in result.scored}
        )
        return result

    mesh.a.runner.execute = broken  # type: ignore[method-assign]
    generate(mesh.a, "r", prompt_of(20), SCORED)
    generate(mesh.a, "other", prompt_of(20, 1))
    mesh.run()

    assert mesh.a.finished["r"].code == "internal" and not mesh.a.rows
    assert mesh.a.tokens["other"] == expect(prompt_of(20, 1))
