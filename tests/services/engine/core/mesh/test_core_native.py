"""Engine cores on the native step: tokens and log-probabilities have the bits of a request that is alone.

Whatever is split, cached, preempted, sent or taken over by another engine, in bf16 as in fp32.
"""

from __future__ import annotations

import random

import pytest

from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.engine.core_mesh import ROUTER, generate, grant_for, prompt_of, receive, send
from tests.support.engine.native_mesh import Bits, NativeMesh, expected

GREEDY = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, logprobs=4)
SAMPLED = SamplingParams(max_tokens=9, temperature=0.9, top_p=0.9, seed=7, ignore_eos=True, logprobs=2)
ONE = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
BLOCK = 4


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_crowd_gets_what_each_would_get_alone(family: str, dtype: str) -> None:
    """Chunks of any size, decodes beside them, prefixes that are cached and shared."""
    mesh = NativeMesh(family, dtype, threads=2, num_blocks=200, max_num_batched_tokens=23)
    common = prompt_of(21, seed=99)
    cases = {}
    for number in range(8):
        prompt = prompt_of(3 + 13 * number % 47, seed=number)
        cases[f"r{number}"] = (
            [*common, *prompt] if number % 2 else prompt,
            [GREEDY, SAMPLED][number % 3 == 0],
        )
    for request_id, (prompt, params) in cases.items():
        generate(mesh.a, request_id, prompt, params)
        for _ in range(3):
            mesh.a.step()
    mesh.run()
    for request_id, (prompt, params) in cases.items():
        assert mesh.bits("a", request_id) == expected(prompt, params, family, dtype)
    assert mesh.a.finished["r7"].usage.cached_tokens == len(common) // BLOCK * BLOCK
    mesh.close()


@pytest.mark.parametrize("family", ["llama", "mistral", "smollm3"])
@pytest.mark.parametrize("length", [1, 5, 17, 50])
def test_every_split_has_the_bits_of_none(family: str, length: int) -> None:
    prompt = prompt_of(length)
    whole = expected(prompt, GREEDY, family)
    amounts = sorted({0, length // 2 // BLOCK * BLOCK})
    mesh = NativeMesh(family)
    for end in sorted({0, 1, 3, 4, 5, 8, 9, 31, length - 1, length} & set(range(length + 1))):
        for here in amounts:
            for there in amounts:
                assert split(mesh, prompt, end, here, there) == whole, (end, here, there)
    mesh.close()


def split(mesh: NativeMesh, prompt: list[int], end: int, here: int, there: int) -> Bits:
    """What ``b`` says behind KV of ``[0, end)`` from ``a``, with so many tokens in their caches."""
    request_id = f"r{end}-{here}-{there}"
    for engine, cached in ((mesh.b, here), (mesh.a, there)):
        engine.core.memory.cache.clear()
        if cached:
            generate(engine, f"warm {request_id}", prompt[:cached], ONE)
    mesh.run()
    granted = grant_for(mesh.b, request_id, prompt, end)
    matched = granted.grant.matched
    is_first_there = end == len(prompt) and matched < end
    numerics = mesh.a.core.numerics.name
    receive(mesh.b, request_id, granted, end, GREEDY, await_first=is_first_there, numerics=numerics)
    call = 0
    if matched < end:
        sampling = GREEDY if is_first_there else None
        call = send(mesh.a, request_id, prompt, granted, matched, end, sampling=sampling)
    mesh.run()
    bits = mesh.bits("b", request_id)
    if not is_first_there:
        return bits
    sent = mesh.a.replies[call]
    assert isinstance(sent, wire.Sent) and sent.first_token is not None and sent.first_logprob is not None
    return Bits([sent.first_token, *bits.tokens[1:]], [sent.first_logprob, *bits.logprobs])


def test_who_is_preempted_goes_on_with_the_same_bits() -> None:
    mesh = NativeMesh(num_blocks=16)
    params = SamplingParams(max_tokens=30, temperature=0.7, seed=3, ignore_eos=True, logprobs=1)
    prompts = {f"r{i}": prompt_of(9 + i, seed=i) for i in range(4)}
    for request_id, prompt in prompts.items():
        generate(mesh.a, request_id, prompt, params)
    mesh.run(limit=5000)
    for request_id, prompt in prompts.items():
        assert mesh.bits("a", request_id) == expected(prompt, params)
    assert mesh.a.core.state.counters["preemptions"] > 0
    mesh.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("num_delivered", [1, 5, 8])
def test_another_engine_goes_on_with_the_same_bits(dtype: str, num_delivered: int) -> None:
    """An engine is lost: what it had decoded, another one prefills."""
    prompt = prompt_of(17)
    whole = expected(prompt, SAMPLED, dtype=dtype)
    mesh = NativeMesh(dtype=dtype)
    known = prompt + whole.tokens[:num_delivered]
    message = wire.StartGenerate(mesh.call(), "r", 0, SAMPLED, 60.0, num_output_tokens=num_delivered)
    mesh.b.core.actions.start_generate(ROUTER, message, known, mesh.now)
    mesh.run()
    got = mesh.bits("b", "r")
    assert got.tokens[num_delivered:] == whole.tokens[num_delivered:]
    assert got.logprobs == whole.logprobs[num_delivered:]
    mesh.close()


def test_a_class_is_its_weights_and_dtype_and_not_its_threads() -> None:
    meshes = [NativeMesh(), NativeMesh(threads=2), NativeMesh(dtype="float32"), NativeMesh("mistral")]
    names = [mesh.a.core.numerics.name for mesh in meshes]
    assert all(mesh.a.core.numerics.is_exact for mesh in meshes)
    assert names[0] == names[1]
    assert len(set(names)) == 3
    for mesh in meshes:
        mesh.close()


def test_any_interleaving_of_arrivals_gives_the_same_bits() -> None:
    rng = random.Random(4)
    mesh = NativeMesh("qwen3", num_blocks=120, max_num_batched_tokens=16)
    cases = {}
    for number in range(12):
        prompt, engine = prompt_of(rng.randrange(1, 60), seed=number % 5), rng.choice([mesh.a, mesh.b])
        params = rng.choice([GREEDY, SAMPLED])
        cases[engine.core.engine_id, f"r{number}"] = (prompt, params)
        generate(engine, f"r{number}", prompt, params)
        for _ in range(rng.randrange(4)):
            mesh.a.step()
            mesh.b.step()
    mesh.run()
    for (name, request_id), (prompt, params) in cases.items():
        assert mesh.bits(name, request_id) == expected(prompt, params, "qwen3")
    mesh.close()
