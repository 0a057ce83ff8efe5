"""A hybrid model's state goes with its KV, at exactly its length: answers stay those of transformers."""

from __future__ import annotations

import pytest

from microserve.protocol.errors import InvalidInterval
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.engine.core_mesh import ROUTER, generate, grant_for, prompt_of, receive, send
from tests.support.engine.hybrid_mesh import FAMILIES, HybridMesh

LOGPROBS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=1)
ONE = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
BLOCK = 4


def check(mesh: HybridMesh, prompt: list[int], end: int, here: int, there: int) -> None:
    """``b`` goes on from ``a``'s KV and state at ``end``; prefixes of so many tokens are cached at each."""
    name = f"r{end}-{here}-{there}"
    for engine, cached in ((mesh.b, here), (mesh.a, there)):
        engine.core.memory.cache.clear()
        if cached:
            generate(engine, f"warm {name}", prompt[:cached], ONE)
    mesh.run()
    granted = grant_for(mesh.b, name, prompt, end)
    grant, layout, is_whole = granted.grant, mesh.b.core.layout, end == len(prompt)
    receive(mesh.b, name, granted, end, LOGPROBS, await_first=is_whole)
    first, nbytes = -1, 0
    if grant.matched < end:
        call = send(mesh.a, name, prompt, granted, 0, end, sampling=LOGPROBS if is_whole else None)
        mesh.run()
        sent = mesh.a.replies[call]
        assert isinstance(sent, wire.Sent)
        first, nbytes = -1 if sent.first_token is None else sent.first_token, sent.nbytes
        assert len(grant.blocks) == layout.num_blocks_for(end - grant.matched) + layout.num_state_blocks
    else:
        assert not grant.blocks and end < len(prompt)
        mesh.run()
    mesh.assert_exact(mesh.b, name, prompt, first=first)
    rows = 2 * layout.row_nbytes * (end - grant.matched)
    states = layout.num_state_blocks * layout.block_nbytes if grant.matched < end else 0
    assert nbytes == layout.num_layers * (rows + states)
    assert mesh.b.finished[name].usage.received_tokens == end - grant.matched


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 4, 5, 19])
def test_every_split_is_exact(family: str, length: int) -> None:
    mesh, prompt = HybridMesh(family), prompt_of(length)
    for end in sorted({1, 3, 4, 5, 8, 16, length - 1, length} & set(range(1, length + 1))):
        for here in {0, length // 2, length}:
            for there in {0, length // 2, length}:
                check(mesh, prompt, end, here, there)
    mesh.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_whose_state_is_cached_at_the_very_length_is_sent_nothing(family: str) -> None:
    mesh, prompt = HybridMesh(family), prompt_of(19)
    check(mesh, prompt, 16, here=17, there=0)
    check(mesh, prompt, 12, here=17, there=0)  # KV of 12 tokens is there, and no state
    mesh.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_receiver_starts_at_the_length_of_its_state_and_nowhere_else(family: str) -> None:
    mesh, prompt = HybridMesh(family), prompt_of(18)
    granted = grant_for(mesh.b, "r", prompt, 10)
    for begin in (8, 9, 11, 12, 18):
        with pytest.raises(InvalidInterval, match="begin must be the grant's end 10"):
            receive(mesh.b, "r", granted, begin)
    mesh.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_prompt_whose_first_token_nobody_samples_is_computed_again(family: str) -> None:
    """The state behind its last token gives no logits of it."""
    mesh, prompt = HybridMesh(family), prompt_of(18)
    granted = grant_for(mesh.b, "r", prompt, 18)
    receive(mesh.b, "r", granted, 18, LOGPROBS)
    send(mesh.a, "r", prompt, granted, 0, 18)
    mesh.run()
    mesh.assert_exact(mesh.b, "r", prompt)
    usage = mesh.b.finished["r"].usage
    assert (usage.received_tokens, usage.cached_tokens) == (0, 0)
    mesh.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_several_senders_bring_the_state_with_the_last(family: str) -> None:
    mesh, prompt = HybridMesh(family, num_blocks=400), prompt_of(30)
    granted = grant_for(mesh.b, "r", prompt, 25)
    receive(mesh.b, "r", granted, 25, LOGPROBS)
    for lane, (begin, end) in enumerate([(0, 9), (9, 16), (16, 25)]):
        send(mesh.a, "r", prompt, granted, begin, end, lane=lane)
    mesh.run()
    mesh.assert_exact(mesh.b, "r", prompt)
    mesh.close()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("end", "kept"), [(16, 16), (17, 0)])
def test_a_context_that_moves_is_gone_on_from_at_whole_blocks(family: str, end: int, kept: int) -> None:
    mesh, prompt = HybridMesh(family), prompt_of(19)
    granted = grant_for(mesh.b, "move", prompt, end)
    send(mesh.a, "move", prompt, granted, 0, end)
    call = mesh.call()
    mesh.b.core.actions.commit(ROUTER, wire.Commit(call, "move", granted.grant.grant_id, 60.0), mesh.now)
    mesh.run()
    committed = mesh.b.replies[call]
    assert isinstance(committed, wire.Committed) and committed.num_tokens == kept
    generate(mesh.b, "r", prompt, LOGPROBS)
    mesh.run()
    mesh.assert_exact(mesh.b, "r", prompt)
    assert mesh.b.finished["r"].usage.cached_tokens == kept
    mesh.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_generation_moves_with_what_it_has_and_goes_on(family: str) -> None:
    """As a drain moves it: whole blocks of prompt and output, the rest is computed there."""
    mesh, prompt = HybridMesh(family), prompt_of(11)
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=1)
    generate(mesh.a, "r", prompt, params)
    while len(mesh.a.tokens.get("r", [])) < 7:
        mesh.a.step()
    mesh.a.core.actions.abort(ROUTER, wire.Abort(mesh.call(), "r"), mesh.now)
    mesh.a.step()
    context = [*prompt, *mesh.a.tokens["r"]]
    end = (len(context) - 1) // BLOCK * BLOCK
    granted = grant_for(mesh.b, "r2", context, end)
    call = send(mesh.a, "r2", context, granted, 0, end)
    receive(mesh.b, "r2", granted, end, params)
    mesh.run()
    mesh.assert_exact(mesh.b, "r2", context)
    sent = mesh.a.replies[call]
    assert isinstance(sent, wire.Sent) and sent.computed == 0, "its state was kept at the block border"
    mesh.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_grant_that_ends_before_its_state_is_in_leaves_nothing(family: str) -> None:
    mesh, prompt = HybridMesh(family), prompt_of(30)
    granted = grant_for(mesh.b, "r", prompt, 25)
    receive(mesh.b, "r", granted, 25, LOGPROBS)
    send(mesh.a, "r", prompt, granted, 0, 25)
    mesh.a.step()
    mesh.b.step()
    mesh.b.core.actions.abort(ROUTER, wire.Abort(mesh.call(), "r"), mesh.now)
    mesh.run()
    complete = grant_for(mesh.b, "kept", prompt, 12)
    mesh.b.core.actions.release(ROUTER, wire.Release(mesh.call(), "kept", complete.grant.grant_id), mesh.now)
    generate(mesh.b, "warm", prompt[:13], ONE)
    mesh.run()
    again = grant_for(mesh.b, "again", prompt, 12)  # complete at once: holds cached blocks of a state
    assert again.grant.matched == 12
    mesh.now += 100.0  # its lease is over
    mesh.run()
    mesh.close()


@pytest.mark.parametrize("length", [5, 19, 40])
def test_windows_beside_full_attention_are_blocks_like_others(length: int) -> None:
    """Of such a family all layers keep KV: no state, and prefixes of any number of blocks."""
    mesh, prompt = HybridMesh("gemma3_text", num_blocks=200, max_num_batched_tokens=16), prompt_of(length)
    assert mesh.a.core.layout.num_state_blocks == 0 and mesh.a.core.memory.states is None
    for end in (length // 2, length - 1):
        name = f"r{end}"
        granted = grant_for(mesh.b, name, prompt, end)
        receive(mesh.b, name, granted, end, LOGPROBS)
        send(mesh.a, name, prompt, granted, granted.grant.matched, end)
        mesh.run()
        mesh.assert_exact(mesh.b, name, prompt)
    generate(mesh.b, "again", prompt, LOGPROBS)
    mesh.run()
    mesh.assert_exact(mesh.b, "again", prompt)
    assert mesh.b.finished["again"].usage.cached_tokens == length // BLOCK * BLOCK
    mesh.close()
