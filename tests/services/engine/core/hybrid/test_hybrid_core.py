"""One engine and a hybrid model gives what transformers does, however requests are cut and mixed."""

from __future__ import annotations

import random

import pytest

from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.engine.core_mesh import ROUTER, generate, prompt_of
from tests.support.engine.hybrid_mesh import FAMILIES, HybridMesh

LOGPROBS = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True, logprobs=1)
SHORT = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
BLOCK = 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [3, 16, 64])
def test_requests_side_by_side_are_those_of_transformers(family: str, budget: int) -> None:
    mesh = HybridMesh(family, num_blocks=200, max_num_batched_tokens=budget)
    prompts = [prompt_of(length, seed=length) for length in (1, 2, 4, 5, 16, 23, 41)]
    for number, prompt in enumerate(prompts):
        generate(mesh.a, f"r{number}", prompt, LOGPROBS)
        mesh.a.step()
    mesh.run()
    for number, prompt in enumerate(prompts):
        mesh.assert_exact(mesh.a, f"r{number}", prompt)
    mesh.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_who_gives_its_blocks_back_computes_again(family: str) -> None:
    num_state = HybridMesh(family).a.core.layout.num_state_blocks
    mesh = HybridMesh(family, num_blocks=18 + 4 * num_state, max_num_batched_tokens=8, max_model_len=60)
    prompts = [prompt_of(length, seed=length) for length in (9, 14, 21, 12)]
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        generate(mesh.a, f"r{number}", prompt, params)
    mesh.run()
    for number, prompt in enumerate(prompts):
        mesh.assert_exact(mesh.a, f"r{number}", prompt)
    assert sum(finished.usage.num_preemptions for finished in mesh.a.finished.values())
    mesh.close()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [3, 4, 5, 16, 19])
def test_a_prompt_that_comes_again_goes_on_from_its_last_block_that_leaves_a_token(
    family: str, length: int
) -> None:
    mesh, prompt = HybridMesh(family), prompt_of(length)
    for number in range(3):
        generate(mesh.a, f"r{number}", prompt, LOGPROBS)
        mesh.run()
        mesh.assert_exact(mesh.a, f"r{number}", prompt)
        cached = mesh.a.finished[f"r{number}"].usage.cached_tokens
        assert cached == ((length - 1) // BLOCK * BLOCK if number else 0)
    mesh.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_is_gone_on_from_where_a_state_stands_and_nowhere_else(family: str) -> None:
    """KV of 24 tokens is there for all that begin so, a state at 20 and 24 alone."""
    mesh, first = HybridMesh(family, num_blocks=400), prompt_of(24)
    generate(mesh.a, "first", first, SHORT)
    mesh.run()
    cases = [("within", first[:11], 0), ("at", [*first[:20], 7, 8], 20), ("past", [*first, 9], 20)]
    for name, prompt, cached in cases:
        generate(mesh.a, name, prompt, LOGPROBS)
        mesh.run()
        mesh.assert_exact(mesh.a, name, prompt)
        assert mesh.a.finished[name].usage.cached_tokens == cached, name
    mesh.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_many_prompts_begin_with_gets_a_state_of_its_own(family: str) -> None:
    mesh, shared = HybridMesh(family, num_blocks=400), prompt_of(16)
    cached = []
    for number in range(3):
        prompt = [*shared, *prompt_of(10, seed=number + 1)]
        generate(mesh.a, f"r{number}", prompt, LOGPROBS)
        mesh.run()
        mesh.assert_exact(mesh.a, f"r{number}", prompt)
        cached.append(mesh.a.finished[f"r{number}"].usage.cached_tokens)
    assert cached == [0, 0, 16]
    mesh.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_goes_on_from_what_was_generated(family: str) -> None:
    mesh, prompt = HybridMesh(family), prompt_of(10)
    generate(mesh.a, "one", prompt, LOGPROBS)
    mesh.run()
    prompt = [*prompt, *mesh.a.tokens["one"], *prompt_of(6, seed=3)]
    generate(mesh.a, "two", prompt, LOGPROBS)
    mesh.run()
    mesh.assert_exact(mesh.a, "two", prompt)
    assert mesh.a.finished["two"].usage.cached_tokens == 16  # of 10 + 9, whose last token has no KV
    assert len(mesh.a.core.memory.cache.states) == 4  # behind 8, 16 (12 gave way), 24; and 28 behind 25 + 9
    mesh.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_evicted_as_blocks_are_and_nothing_leaks(family: str) -> None:
    num_state = HybridMesh(family).a.core.layout.num_state_blocks
    mesh = HybridMesh(family, num_blocks=16 + 4 * num_state, max_model_len=56)
    rng = random.Random(5)
    bases = [prompt_of(30, seed=seed) for seed in range(3)]
    for number in range(40):
        base = bases[rng.randrange(3)]
        prompt = [*base[: rng.randint(1, 30)], *prompt_of(rng.randint(1, 9), seed=number)]
        generate(mesh.a, f"r{number}", prompt, LOGPROBS)
        for _ in range(rng.randint(0, 6)):
            mesh.a.step()
        if rng.random() < 0.2:
            mesh.a.core.actions.abort(ROUTER, wire.Abort(mesh.call(), f"r{number}"), mesh.now)
    mesh.run()
    for number in range(40):
        if (finished := mesh.a.finished.get(f"r{number}")) is not None:
            assert finished.reason == "length"
    mesh.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_of_a_prompt_come_with_it(family: str) -> None:
    mesh, prompt = HybridMesh(family), prompt_of(21)
    generate(mesh.a, "cold", prompt, LOGPROBS)
    mesh.run()
    wanted = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=1, prompt_logprobs=0)
    generate(mesh.a, "scored", prompt, wanted)
    mesh.run()
    mesh.assert_exact(mesh.a, "scored", prompt)
    assert mesh.a.rows["scored"].end == len(prompt)
    assert mesh.a.finished["scored"].usage.cached_tokens == 0
    mesh.close()
