"""A real vLLM and another host: KV goes both ways through doors."""

from __future__ import annotations

import pytest

from microserve.kvcache.heap.doors.host import HostView, Opening
from microserve.services.engine.vllm.link import Freed, Received, Sent
from tests.support.vllm.exchange import assert_equal, kv_of, prompt_of
from tests.support.vllm.hosted import Hosted, Peer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
DOOR = Opening(["tcp"], shares_memory=False)


def test_kv_goes_out_and_comes_in_through_doors_of_tcp(vllm: Hosted) -> None:
    prompt = prompt_of(140, seed=1)
    expected = vllm.generate(prompt, max_tokens=4)["tokens"]
    vllm.forget()
    peer = Peer(vllm.layout, opening=DOOR)
    brought = peer.grant(140)
    assert brought.heap.kind == "tcp"
    request_id, _ = vllm.send(prompt, brought)
    vllm.run(request_id)
    sent = vllm.hear(Sent)
    assert sent.heap == "tcp"
    peer.verify(brought)
    vllm.forget()

    _, receive, grant = vllm.receive(prompt)
    with HostView(vllm.heap.address, vllm.layout, DOOR) as door, peer.heap.attach(door.address) as way:
        peer.put(vllm, grant, brought.blocks, way)
        way.poll(wait=True)
    vllm.verify(grant)
    assert_equal(kv_of(vllm.heap, grant.blocks), kv_of(peer.heap, brought.blocks))
    vllm.front.page.take(receive)
    assert vllm.generate(prompt, after=receive, max_tokens=4)["tokens"] == expected
    vllm.hear(Received)
    vllm.hear(Freed)
    peer.close()
