"""KV into and out of a real vLLM, token for token and byte for byte."""

from __future__ import annotations

from typing import Any

import pytest

from microserve.protocol.messages.kv.grant import Grant
from microserve.services.engine.vllm.link import Freed, Generate, Received, Sent
from tests.support.vllm.exchange import assert_equal, fetch, kv_of, prompt_of
from tests.support.vllm.hosted import BLOCK_SIZE, Hosted, Peer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]  # vLLM starts slowly on a busy machine
EDGES = [1, 31, 32, 33, 63, 64, 65, 96, 127, 128, 200]


def relay(
    vllm: Hosted, peer: Peer, prompt: list[int], brought: Grant, end: int, **sampling: Any
) -> dict[str, Any]:
    """Receive ``prompt[:end]`` from the peer's blocks, then generate from it."""
    _, receive, grant = vllm.receive(prompt[:end])
    generating = vllm.add(vllm.new_id("g"), prompt, Generate(receive), **sampling)
    assert generating not in vllm.step(), "it waits for its receive"
    peer.put(vllm, grant, brought.blocks)
    vllm.verify(grant)
    vllm.front.page.take(receive)
    (found,) = vllm.run(generating)
    assert vllm.hear(Received).id == receive
    assert vllm.hear(Freed).id == receive
    return found


@pytest.mark.parametrize("end", EDGES)
def test_a_received_prefix_gives_the_tokens_of_a_cached_one(vllm: Hosted, peer: Peer, end: int) -> None:
    prompt = prompt_of(210, seed=end)
    vllm.generate(prompt[:end])
    expected = vllm.generate(prompt, max_tokens=8, logprobs=0)
    vllm.forget()
    brought = fetch(vllm, peer, prompt[:end])
    vllm.forget()

    found = relay(vllm, peer, prompt, brought, end, max_tokens=8, logprobs=0)

    assert found["cached"] == expected["cached"] == end // BLOCK_SIZE * BLOCK_SIZE
    assert (found["tokens"], found["logprobs"]) == (expected["tokens"], expected["logprobs"])


def test_bytes_are_equal_in_both_heaps_in_every_layer(vllm: Hosted, peer: Peer) -> None:
    prompt = prompt_of(300, seed=1)
    grant = peer.grant(300)
    request_id, _ = vllm.send(prompt, grant)
    blocks: list[int] = []
    while not vllm.notices(Sent):
        vllm.step()
        blocks = vllm.call("block_ids", request_id) or blocks
    assert len(blocks) == len(grant.blocks) == 10
    assert_equal(kv_of(vllm.heap, blocks), kv_of(peer.heap, grant.blocks))
    assert all(layer.any() for layer in kv_of(peer.heap, grant.blocks))
    vllm.settle()

    vllm.forget()
    _, receive, theirs = vllm.receive(prompt)
    peer.put(vllm, theirs, grant.blocks)
    vllm.verify(theirs)
    assert_equal(kv_of(vllm.heap, theirs.blocks), kv_of(peer.heap, grant.blocks))
    vllm.front.page.take(receive)
    vllm.hear(Received)
    vllm.front.page.drop(receive)
    vllm.hear(Freed)


def test_chunks_that_end_inside_blocks(vllm: Hosted, peer: Peer) -> None:
    """300 tokens come as 200 and 100; another request's decode is in the same steps, and shifts them."""
    prompt = prompt_of(420, seed=2)
    other = vllm.add(vllm.new_id("o"), prompt_of(10, seed=3), max_tokens=12)
    vllm.step()
    fetch(vllm, peer, prompt)
    vllm.run(other)


def test_what_vllm_has_in_its_own_cache_is_sent_too(vllm: Hosted, peer: Peer) -> None:
    prompt = prompt_of(150, seed=4)
    cold = fetch(vllm, peer, prompt)
    warm = fetch(vllm, peer, prompt)
    full = [grant.blocks[:4] for grant in (cold, warm)]
    assert_equal(kv_of(peer.heap, full[0]), kv_of(peer.heap, full[1]))


def test_a_prefix_that_the_receiver_has_is_not_asked_for(vllm: Hosted, peer: Peer) -> None:
    prompt = prompt_of(210, seed=5)
    vllm.generate(prompt[:150])
    expected = vllm.generate(prompt, max_tokens=8, logprobs=0)
    vllm.forget()
    brought = fetch(vllm, peer, prompt[:150])
    vllm.forget()
    vllm.generate(prompt[:70])

    _, receive, grant = vllm.receive(prompt[:150])
    assert (grant.matched, len(grant.blocks)) == (64, 3)
    peer.put(vllm, grant, brought.blocks)
    vllm.verify(grant)
    vllm.front.page.take(receive)
    found = vllm.generate(prompt, after=receive, max_tokens=8, logprobs=0)
    assert (found["tokens"], found["logprobs"]) == (expected["tokens"], expected["logprobs"])
    assert found["cached"] == 128


def test_all_of_it_is_there_but_what_gives_the_next_token(vllm: Hosted, peer: Peer) -> None:
    prompt = prompt_of(128, seed=6)
    brought = fetch(vllm, peer, prompt)
    expected = vllm.generate(prompt, max_tokens=4)
    _, receive, grant = vllm.receive(prompt)
    assert (grant.matched, len(grant.blocks)) == (96, 1)
    peer.put(vllm, grant, brought.blocks)
    vllm.verify(grant)
    vllm.front.page.take(receive)
    assert vllm.generate(prompt, after=receive, max_tokens=4)["tokens"] == expected["tokens"]


def test_the_first_token_comes_with_the_kv_and_can_be_forced(vllm: Hosted, peer: Peer) -> None:
    prompt = prompt_of(100, seed=7)
    whole = vllm.generate(prompt, max_tokens=8, logprobs=0)
    expected = whole["tokens"]
    vllm.forget()
    grant = peer.grant(100)
    request_id, _ = vllm.send(prompt, grant, first=True)
    (output,) = vllm.run(request_id)
    vllm.hear(Sent)
    peer.verify(grant)
    assert peer.table.first_token(grant.grant_id) == output["tokens"][0] == expected[0]
    vllm.forget()

    found = relay(vllm, peer, [*prompt, expected[0]], grant, 100, max_tokens=7, logprobs=0)
    assert (found["tokens"], found["logprobs"]) == (expected[1:], whole["logprobs"][1:]), (
        "as one that never moved"
    )
    assert found["cached"] == 100


def test_two_senders_fill_one_receive_in_two_lanes(vllm: Hosted, peer: Peer) -> None:
    prompt = prompt_of(140, seed=8)
    brought = fetch(vllm, peer, prompt)
    expected = vllm.generate(prompt, max_tokens=4)["tokens"]
    vllm.forget()
    _, receive, grant = vllm.receive(prompt)
    for lane, (begin, end) in enumerate([(0, 64), (64, 140)]):
        writer = peer.writer(vllm, grant, begin, end, lane)
        writer.claim()
        for layer in range(vllm.layout.num_layers):
            writer.put_layer(layer, brought.blocks, begin, end)
        writer.finish()
    vllm.verify(grant)
    vllm.front.page.take(receive)
    assert vllm.generate(prompt, after=receive, max_tokens=4)["tokens"] == expected


def test_relays_at_once_beside_a_decode(vllm: Hosted, peer: Peer) -> None:
    prompts = [prompt_of(90 + 10 * i, seed=20 + i) for i in range(3)]
    brought = [fetch(vllm, peer, prompt) for prompt in prompts]
    vllm.forget()
    decode = vllm.add(vllm.new_id("o"), prompt_of(40, seed=30), max_tokens=60)
    receives = [vllm.receive(prompt) for prompt in prompts]
    generates = [
        vllm.add(vllm.new_id("g"), prompt, Generate(receive), max_tokens=5)
        for prompt, (_, receive, _) in zip(prompts, receives, strict=True)
    ]
    for (_, receive, grant), theirs in zip(reversed(receives), reversed(brought), strict=True):
        peer.put(vllm, grant, theirs.blocks)
        vllm.verify(grant)
        vllm.front.page.take(receive)
        vllm.step()
    outputs = vllm.run(decode, *generates)
    assert [output["cached"] for output in outputs[1:]] == [64, 96, 96]
    assert {output["reason"] for output in outputs} == {"length"}
    assert len(vllm.notices(Freed)) == 3


def test_every_layer_of_every_step_is_counted(vllm: Hosted) -> None:
    before = vllm.front.page.progress()
    vllm.generate(prompt_of(40, seed=9), max_tokens=6)
    after = vllm.front.page.progress()
    assert after.layers - before.layers == 6 * vllm.layout.num_layers
    assert after.steps - before.steps >= 6
    assert after.free_blocks <= vllm.layout.num_blocks
