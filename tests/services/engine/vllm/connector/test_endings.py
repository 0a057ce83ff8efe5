"""What ends otherwise than planned: aborts in every state, dead and late writers, refusals, preemption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from microserve.kvcache.grant.table import Discharged, Expired
from microserve.protocol.errors import TransferFailed
from microserve.services.engine.vllm.link import (
    Allocated,
    Freed,
    Generate,
    Receive,
    Received,
    SendFailed,
    Sent,
)
from tests.support.vllm.exchange import assert_equal, fetch, kv_of, prompt_of
from tests.support.vllm.hosted import ROOT, HostDied, Hosted, Peer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]  # vLLM starts slowly on a busy machine


def test_abort_before_blocks_are_allocated(vllm: Hosted) -> None:
    request_id, receive = vllm.begin_receive(prompt_of(100, seed=1))
    waiting = vllm.add(vllm.new_id("g"), prompt_of(120, seed=1), Generate(receive))
    vllm.call("abort", request_id)
    assert vllm.hear(Freed).id == receive
    assert vllm.notices(Allocated) == []
    assert vllm.run(waiting)[0]["cached"] == 0, "whoever waited for it computes all of it"


def test_abort_while_parked_keeps_the_blocks_until_no_writer_is_left(vllm: Hosted, peer: Peer) -> None:
    prompt = prompt_of(100, seed=2)
    before = vllm.call("free_blocks")
    request_id, receive, grant = vllm.receive(prompt)
    writer = peer.writer(vllm, grant, 0, 100)
    writer.claim()
    writer.put_layer(0, [0, 1, 2, 3], 0, 100)
    vllm.call("abort", request_id)
    vllm.table.close(grant.grant_id, 0.0)
    for _ in range(5):
        vllm.step()
    assert vllm.call("free_blocks") == before - 4
    assert vllm.notices(Freed) == []
    with pytest.raises(TransferFailed, match="closed"):
        writer.put_layer(1, [0, 1, 2, 3], 0, 100)
    assert vllm.table.poll(0.0) == [], "its lane is held"
    writer.fail()
    assert [type(event) for event in vllm.table.poll(0.0)] == [Discharged]
    vllm.front.page.drop(receive)
    assert vllm.hear(Freed).id == receive
    assert vllm.call("free_blocks") == before
    assert vllm.generate(prompt)["cached"] == 0, "what came is nobody's prefix"


def test_abort_and_take_in_either_order_frees_once(vllm: Hosted, peer: Peer) -> None:
    prompt = prompt_of(100, seed=3)
    brought = fetch(vllm, peer, prompt)
    for take_first in (True, False):
        vllm.forget()
        request_id, receive, grant = vllm.receive(prompt)
        peer.put(vllm, grant, brought.blocks)
        vllm.verify(grant)
        if take_first:
            vllm.front.page.take(receive)
        vllm.call("abort", request_id)
        vllm.front.page.take(receive)
        assert vllm.hear(Freed).id == receive
        assert vllm.notices(Received) == []


def test_abort_between_the_report_and_its_promotion(vllm: Hosted, peer: Peer) -> None:
    prompt = prompt_of(100, seed=4)
    brought = fetch(vllm, peer, prompt)
    vllm.forget()
    request_id, receive, grant = vllm.receive(prompt)
    peer.put(vllm, grant, brought.blocks)
    vllm.verify(grant)
    vllm.front.page.take(receive)
    while not vllm.notices(Received):
        vllm.step()
    vllm.call("abort", request_id)
    for _ in range(3):
        vllm.step()
    assert vllm.notices(Freed) == [], "kept until its word says so, or somebody generates"
    vllm.front.page.drop(receive)
    assert vllm.hear(Freed).id == receive


def test_a_commit_keeps_its_blocks_until_it_is_dropped(vllm: Hosted, peer: Peer) -> None:
    prompt = prompt_of(100, seed=5)
    brought = fetch(vllm, peer, prompt)
    vllm.forget()
    before = vllm.call("free_blocks")
    _, receive, grant = vllm.receive(prompt)
    peer.put(vllm, grant, brought.blocks)
    vllm.verify(grant)
    vllm.front.page.take(receive)
    vllm.hear(Received)
    for _ in range(5):
        vllm.step()
    assert vllm.call("free_blocks") == before - 4
    vllm.front.page.drop(receive)
    vllm.hear(Freed)
    assert vllm.call("free_blocks") == before
    assert vllm.generate([*prompt, 7])["cached"] == 96


def test_a_generate_that_is_aborted_while_it_waits(vllm: Hosted) -> None:
    prompt = prompt_of(100, seed=6)
    request_id, receive, grant = vllm.receive(prompt)
    waiting = vllm.add(vllm.new_id("g"), prompt, Generate(receive))
    vllm.step()
    vllm.call("abort", waiting)
    vllm.call("abort", request_id)
    vllm.table.close(grant.grant_id, 0.0)
    vllm.front.page.drop(receive)
    vllm.hear(Freed)


def test_a_generate_after_nothing_is_an_ordinary_request(vllm: Hosted) -> None:
    assert vllm.generate(prompt_of(40, seed=7), after=123 << 16)["cached"] == 0


def test_a_receive_twice_and_one_that_does_not_fit_its_prompt(vllm: Hosted) -> None:
    """An assertion in vLLM would be its end."""
    prompt = prompt_of(100, seed=8)
    request_id, receive, grant = vllm.receive(prompt)
    twice = vllm.add(vllm.new_id("r"), prompt, Receive(receive, 100))
    wrong = vllm.front.page.begin()
    assert wrong is not None
    vllm.begun.add(wrong)
    long = vllm.add(vllm.new_id("r"), prompt, Receive(wrong, 500))
    vllm.run(twice, long)
    assert [notice.id for notice in vllm.notices(Freed)] == [wrong]
    vllm.call("abort", request_id)
    vllm.table.close(grant.grant_id, 0.0)
    vllm.front.page.drop(receive)
    vllm.hear(Freed)


def test_an_ask_that_does_not_decode_is_an_ordinary_request(vllm: Hosted) -> None:
    request_id = vllm.new_id("x")
    vllm.call("add", request_id, prompt_of(40, seed=9), {"microserve": {"op": "?"}}, {"max_tokens": 2})
    assert len(vllm.run(request_id)[0]["tokens"]) == 2


def test_a_lease_that_ends_while_a_late_writer_holds_its_lane(vllm: Hosted, peer: Peer) -> None:
    prompt = prompt_of(100, seed=10)
    before = vllm.call("free_blocks")
    request_id, receive, grant = vllm.receive(prompt, now=0.0)
    late = peer.writer(vllm, grant, 0, 100)
    late.claim()
    assert [type(event) for event in vllm.table.poll(5.0)] == [Expired]
    vllm.call("abort", request_id)
    # All others have what is left, and their KV stays theirs.
    others = [vllm.generate(prompt_of(150, seed=60 + i), max_tokens=3) for i in range(3)]
    assert len(others) == 3
    assert vllm.call("free_blocks") == before - 4
    with pytest.raises(TransferFailed, match="closed"):
        late.put_layer(0, [0, 1, 2, 3], 0, 100)
    late.fail()
    assert [type(event) for event in vllm.table.poll(6.0)] == [Discharged]
    vllm.front.page.drop(receive)
    vllm.hear(Freed)
    assert vllm.call("free_blocks") == before


WRITER = """
import os, signal, sys
import msgspec
from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.heap.shm import ShmHeap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.messages.kv.grant import Grant
packed = bytes.fromhex(sys.argv[1])
layout, grant, die_at = msgspec.msgpack.decode(packed, type=tuple[KvLayout, Grant, int])
heap = ShmHeap(layout, incarnation=999)
heap.back(0, layout.num_blocks)
heap.data[:] = 255
writer = LaneWriter(heap, heap.attach(grant.heap), grant, 0, 0, grant.end, checksums=True)
writer.claim()
for layer in range(layout.num_layers):
    if layer == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    writer.put_layer(layer, list(range(8)), 0, grant.end)
"""


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_sender_that_is_killed_at_a_layer(vllm: Hosted, layer: int) -> None:
    prompt = prompt_of(100, seed=11)
    request_id, receive, grant = vllm.receive(prompt)
    layout = msgspec.structs.replace(vllm.layout, num_blocks=8)
    packed = msgspec.msgpack.encode((layout, grant, layer)).hex()
    done = subprocess.run(
        [sys.executable, "-P", "-c", WRITER, packed],
        env={**os.environ, "PYTHONPATH": str(ROOT / ".src")},
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert "gone before its part was whole" in (vllm.table.poisoned(grant.grant_id) or "")
    vllm.call("abort", request_id)
    vllm.table.close(grant.grant_id, 0.0)
    vllm.front.page.drop(receive)
    vllm.hear(Freed)
    # The next one of the same prompt, and the blocks' next owners, are clean.
    clean = vllm.generate(prompt, max_tokens=6)
    assert clean["cached"] == 0
    vllm.forget()
    assert vllm.generate(prompt, max_tokens=6)["tokens"] == clean["tokens"]


def test_abort_of_a_send_between_two_chunks(vllm: Hosted, peer: Peer) -> None:
    prompt = prompt_of(400, seed=12)
    grant = peer.grant(400)
    request_id, send = vllm.send(prompt, grant)
    vllm.step()
    assert peer.heap.is_held(grant.slot, 0)
    vllm.call("abort", request_id)
    failed = vllm.hear(SendFailed)
    assert (failed.id, failed.code) == (send, "transfer_failed")
    assert not peer.heap.is_held(grant.slot, 0)
    assert "gave up" in (peer.table.poisoned(grant.grant_id) or "")


def test_a_receiver_that_closes_its_grant_ends_the_send_and_not_the_step(vllm: Hosted, peer: Peer) -> None:
    prompt = prompt_of(400, seed=13)
    grant = peer.grant(400)
    request_id, send = vllm.send(prompt, grant)
    other = vllm.add(vllm.new_id("o"), prompt_of(20, seed=14), max_tokens=5)
    vllm.step()
    peer.table.close(grant.grant_id, 0.0)
    assert vllm.hear(SendFailed).id == send
    assert len(peer.table.poll(0.0)) == 1, "let go: the blocks are the receiver's again"
    vllm.run(request_id, other)


def test_a_receiver_that_is_gone(vllm: Hosted, peer: Peer) -> None:
    prompt = prompt_of(100, seed=15)
    grant = peer.grant(100)
    peer.close()
    request_id, send = vllm.send(prompt, grant)
    vllm.run(request_id)
    failed = vllm.hear(SendFailed)
    assert failed.id == send and "gone" in failed.detail


def test_kv_of_another_order_is_refused_with_both(vllm: Hosted, peer: Peer) -> None:
    grant = msgspec.structs.replace(peer.grant(100), layout_hash="0" * 16)
    request_id, _ = vllm.send(prompt_of(100, seed=16), grant)
    vllm.run(request_id)
    assert vllm.layout.layout_hash in vllm.hear(SendFailed).detail


def test_a_part_that_begins_inside_a_block_is_refused(vllm: Hosted, peer: Peer) -> None:
    grant = peer.grant(100)
    request_id, _ = vllm.send(prompt_of(100, seed=17), grant, begin=33)
    vllm.run(request_id)
    failed = vllm.hear(SendFailed)
    assert failed.code == "invalid_interval" and "begin is 33" in failed.detail


def test_preempted_senders_and_receivers_finish(vllm: Hosted, peer: Peer) -> None:
    """More is asked for than fits: 64 blocks, five requests that grow to 16 each."""
    prompt = prompt_of(200, seed=18)
    expected = vllm.generate(prompt, max_tokens=6)["tokens"]
    brought = fetch(vllm, peer, prompt)
    vllm.forget()
    _, receive, grant = vllm.receive(prompt)
    crowd = [vllm.add(vllm.new_id("o"), prompt_of(200, seed=40 + i), max_tokens=300) for i in range(5)]
    for _ in range(20):
        vllm.step()
    peer.put(vllm, grant, brought.blocks)
    vllm.verify(grant)
    vllm.front.page.take(receive)
    generating = vllm.add(vllm.new_id("g"), prompt, Generate(receive), max_tokens=250)
    to_send = peer.grant(300)
    sending, _ = vllm.send(prompt_of(300, seed=19), to_send)
    outputs = vllm.run(generating, sending, *crowd)
    assert outputs[0]["tokens"][:6] == expected
    assert [len(output["tokens"]) for output in outputs] == [250, 1, 300, 300, 300, 300, 300]
    vllm.hear(Sent)
    peer.verify(to_send)
    assert vllm.call("num_preemptions") > 0


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 5])
def test_a_vllm_that_is_killed_while_it_sends(
    vllm_python: Path, model: Path, tmp_path: Path, layers: int
) -> None:
    """In its first chunk or its second: its lane is free, and the receiver knows."""
    hosted = Hosted(vllm_python, model, incarnation=8)
    try:
        hosted.start()
        peer = Peer(hosted.layout)
        grant = peer.grant(400)
        hosted.send(prompt_of(400, seed=20), grant)
        hosted.call("die_at_layer", layers)
        with pytest.raises(HostDied):
            hosted.settle()
        hosted.process.wait()
        assert not peer.heap.is_held(grant.slot, 0)
        assert not peer.table.is_complete(grant.grant_id)
        assert "gone before its part was whole" in (peer.table.poisoned(grant.grant_id) or "")
        with peer.heap.attach(grant.heap) as itself:
            assert not itself.owner_is_dead()
        with pytest.raises(TransferFailed, match="gone"):
            peer.heap.attach(hosted.heap.address)
        peer.close()
    finally:
        hosted.close()


def test_bytes_of_a_prefix_survive_its_way_there_and_back(vllm: Hosted, peer: Peer) -> None:
    prompt = prompt_of(64 + 32, seed=21)
    there = fetch(vllm, peer, prompt)
    vllm.forget()
    _, receive, grant = vllm.receive(prompt)
    peer.put(vllm, grant, there.blocks)
    vllm.verify(grant)
    vllm.front.page.take(receive)
    vllm.hear(Received)
    back = fetch(vllm, peer, prompt)
    vllm.front.page.drop(receive)
    vllm.hear(Freed)
    full = [each.blocks[:2] for each in (there, back)]
    assert_equal(kv_of(peer.heap, full[0]), kv_of(peer.heap, full[1]))
