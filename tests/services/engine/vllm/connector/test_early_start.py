"""A real vLLM that begins on the rest of a prompt while the layers before it still arrive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from microserve.kvcache.grant.table import Discharged
from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.heap.heap import Copies, Copy
from microserve.protocol.messages.kv.grant import Grant
from microserve.services.engine.vllm.link import Arrived, Freed, Generate, NotArrived, Received
from tests.support.vllm.exchange import fetch, prompt_of
from tests.support.vllm.hosted import ROOT, Hosted, Peer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]  # vLLM starts slowly on a busy machine
NUM_LAYERS = 3
PATIENCE_S = 120.0


class Behind(threading.Thread):
    """Calls ``act`` with each layer from ``first`` on, once vLLM has computed the one before it; until it
    returns something."""

    def __init__(self, vllm: Hosted, first: int, act: Callable[[int], object]) -> None:
        super().__init__(daemon=True)
        self.vllm, self.first, self.act = vllm, first, act
        self.before = vllm.front.page.progress().layers
        self.over = threading.Event()

    def run(self) -> None:
        for layer in range(self.first, NUM_LAYERS):
            while self.vllm.front.page.progress().layers < self.before + layer:
                if self.over.wait(0.001):
                    return
            if self.act(layer):
                return

    def __enter__(self) -> Behind:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join(PATIENCE_S)


def start(vllm: Hosted, receive: int, grant: Grant) -> None:
    vllm.front.page.start(receive, grant.slot, grant.generation)


def finish(vllm: Hosted, receive: int, grant: Grant) -> None:
    """As the front does it when all of it was in."""
    assert [notice.id for notice in vllm.notices(Arrived)] == [receive]
    vllm.settle_grant(grant)
    vllm.front.page.take(receive)


def put(writer: LaneWriter, layer: int, brought: Grant, end: int) -> None:
    writer.put_layer(layer, brought.blocks, 0, end)


def relay_early(
    vllm: Hosted, peer: Peer, prompt: list[int], brought: Grant, end: int, first: int, **sampling: Any
) -> dict[str, Any]:
    """Layers before ``first`` are in when vLLM begins; each other comes behind the one before it."""
    _, receive, grant = vllm.receive(prompt[:end])
    generating = vllm.add(vllm.new_id("g"), prompt, Generate(receive), **sampling)
    writer = peer.writer(vllm, grant, 0, end)
    writer.claim()
    for layer in range(first):
        writer.put_layer(layer, brought.blocks, 0, end)
    start(vllm, receive, grant)
    with Behind(vllm, first, lambda layer: put(writer, layer, brought, end)):
        while not vllm.outputs.get(generating):
            vllm.step()
    writer.finish()
    finish(vllm, receive, grant)
    (found,) = vllm.run(generating)
    assert vllm.hear(Received).id == receive
    assert vllm.hear(Freed).id == receive
    return found


def relay(vllm: Hosted, peer: Peer, prompt: list[int], brought: Grant, end: int, **sampling: Any) -> Any:
    _, receive, grant = vllm.receive(prompt[:end])
    generating = vllm.add(vllm.new_id("g"), prompt, Generate(receive), **sampling)
    peer.put(vllm, grant, brought.blocks)
    vllm.verify(grant)
    vllm.front.page.take(receive)
    (found,) = vllm.run(generating)
    assert vllm.hear(Received).id == vllm.hear(Freed).id == receive
    return found


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("end", [32, 64, 96, 128, 192])
def test_every_aligned_split_gives_the_tokens_of_a_whole_wait(
    vllm: Hosted, peer: Peer, end: int, first: int
) -> None:
    prompt = prompt_of(210, seed=end)
    brought = fetch(vllm, peer, prompt[:end])
    vllm.forget()
    expected = relay(vllm, peer, prompt, brought, end, max_tokens=8, logprobs=0)
    vllm.forget()
    found = relay_early(vllm, peer, prompt, brought, end, first, max_tokens=8, logprobs=0)
    assert found["cached"] == expected["cached"] == end
    assert (found["tokens"], found["logprobs"]) == (expected["tokens"], expected["logprobs"])
    # And it is a prefix like any other afterwards.
    assert vllm.generate(prompt, max_tokens=1)["cached"] == 192


def begin(vllm: Hosted, prompt: list[int], end: int, **sampling: Any) -> tuple[str, int, Grant]:
    """Its generation, its receive and that one's grant."""
    _, receive, grant = vllm.receive(prompt[:end])
    return vllm.add(vllm.new_id("g"), prompt, Generate(receive), **sampling), receive, grant


def give_up(vllm: Hosted, receive: int, grant: Grant) -> None:
    """As the front does it when nobody can bring the rest."""
    vllm.table.close(grant.grant_id, 0.0)
    if not vllm.table.has_any:
        vllm.front.page.drop(receive)


WRITER = """
import os, signal, sys
import msgspec
from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.heap.shm import ShmHeap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.messages.kv.grant import Grant
packed = bytes.fromhex(sys.argv[1])
layout, grant, num_layers = msgspec.msgpack.decode(packed, type=tuple[KvLayout, Grant, int])
heap = ShmHeap(layout, incarnation=999)
heap.back(0, layout.num_blocks)
heap.data[:] = 255
writer = LaneWriter(heap, heap.attach(grant.heap), grant, 0, 0, grant.end, checksums=True)
writer.claim()
for layer in range(num_layers):
    writer.put_layer(layer, list(range(8)), 0, grant.end)
print("put", flush=True)
signal.pause()
"""


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_a_sender_that_is_killed_behind_a_layer(vllm: Hosted, layers: int) -> None:
    """What it left is NaN: whoever computed from it would show it."""
    prompt, other = prompt_of(150, seed=11), prompt_of(40, seed=12)
    expected = vllm.generate(prompt, max_tokens=6)["tokens"]
    alone = vllm.generate(other, max_tokens=30)["tokens"]
    vllm.forget()
    before = vllm.call("free_blocks")
    beside = vllm.add(vllm.new_id("o"), other, max_tokens=30)
    vllm.step()
    generating, receive, grant = begin(vllm, prompt, 96, max_tokens=6)
    packed = msgspec.msgpack.encode((msgspec.structs.replace(vllm.layout, num_blocks=8), grant, layers))
    sender = subprocess.Popen(
        [sys.executable, "-P", "-c", WRITER, packed.hex()],
        env={**os.environ, "PYTHONPATH": str(ROOT / ".src")},
        stdout=subprocess.PIPE,
    )
    assert sender.stdout is not None and sender.stdout.readline() == b"put\n"

    def dies(layer: int) -> None:
        if layer == layers:
            sender.send_signal(signal.SIGKILL)
            sender.wait(PATIENCE_S)
            assert "gone before its part was whole" in (vllm.table.poisoned(grant.grant_id) or "")
            give_up(vllm, receive, grant)

    with sender.stdout:
        start(vllm, receive, grant)
        with Behind(vllm, layers, dies):
            (failed,) = vllm.run(generating)
    assert (failed["reason"], failed["tokens"]) == ("error", [])
    (told,) = vllm.notices(NotArrived)
    assert told.id == receive and "closed" in told.detail
    # Others in its batch, the next one of its prompt and the blocks' next owners are as if nothing had been.
    assert vllm.hear(Freed).id == receive
    again = vllm.generate(prompt, max_tokens=6)
    assert (again["cached"], again["tokens"]) == (0, expected)
    (found,) = vllm.run(beside)
    assert (found["tokens"], found["reason"]) == (alone, "length")
    crowd = [vllm.add(vllm.new_id("o"), prompt_of(200, seed=60 + i), max_tokens=3) for i in range(6)]
    assert {each["reason"] for each in vllm.run(*crowd)} == {"length"}
    vllm.settle()
    assert vllm.call("free_blocks") == before
    assert vllm.notices(NotArrived) == [], "said once"


@pytest.mark.parametrize("comes", [True, False])
def test_who_has_the_same_prefix_waits_until_it_is_settled(vllm: Hosted, peer: Peer, comes: bool) -> None:
    prompt = prompt_of(150, seed=13)
    brought = fetch(vllm, peer, prompt[:96])
    vllm.forget()
    expected = vllm.generate(prompt, max_tokens=4)["tokens"]
    vllm.forget()
    generating, receive, grant = begin(vllm, prompt, 96, max_tokens=4)
    writer = peer.writer(vllm, grant, 0, 96)
    writer.claim()
    start(vllm, receive, grant)
    vllm.step()  # reported; promoted in the next one
    stranger = vllm.add(vllm.new_id("o"), prompt, max_tokens=4)

    def act(layer: int) -> None:
        if comes or layer == 0:
            put(writer, layer, brought, 96)
        elif layer == 1:
            writer.fail()
            give_up(vllm, receive, grant)

    with Behind(vllm, 0, act):
        while not vllm.outputs.get(generating):
            assert stranger not in vllm.step()
    if comes:
        for _ in range(3):
            assert stranger not in vllm.step(), "a writer may still be there"
        writer.finish()
        finish(vllm, receive, grant)
        assert vllm.run(generating)[0]["tokens"] == expected
    found = vllm.run(stranger)[0]
    assert found["cached"] == (128 if comes else 0) and found["tokens"] == expected
    vllm.hear(Freed)


def test_blocks_are_kept_while_a_late_writer_holds_its_lane(vllm: Hosted, peer: Peer) -> None:
    prompt = prompt_of(150, seed=14)
    before = vllm.call("free_blocks")
    generating, receive, grant = begin(vllm, prompt, 96)
    writer = peer.writer(vllm, grant, 0, 96)
    writer.claim()
    writer.put_layer(0, [0, 1, 2], 0, 96)
    start(vllm, receive, grant)
    with Behind(vllm, 1, lambda layer: give_up(vllm, receive, grant) if layer == 1 else None):
        (failed,) = vllm.run(generating)
    assert failed["reason"] == "error"
    for seed in range(3):
        vllm.generate(prompt_of(150, seed=70 + seed), max_tokens=3)
    vllm.step()
    assert vllm.call("free_blocks") == before - 3, "its own, whoever has ended"
    writer.fail()
    assert [type(event) for event in vllm.table.poll(0.0)] == [Discharged]
    vllm.front.page.drop(receive)
    assert vllm.hear(Freed).id == receive
    vllm.settle()
    assert vllm.call("free_blocks") == before


@pytest.mark.parametrize("in_step", [True, False])
def test_an_abort_of_its_generation(vllm: Hosted, peer: Peer, in_step: bool) -> None:
    """While its step waits for a layer that does not come, or before that step. vLLM does not know it any
    more when it hears what was not in, and what it has cached must not be found."""
    prompt = prompt_of(200, seed=15)
    expected = vllm.generate(prompt, max_tokens=4)["tokens"]
    vllm.forget()
    generating, receive, grant = begin(vllm, prompt, 96, max_tokens=4)
    writer = peer.writer(vllm, grant, 0, 96)
    writer.claim()
    writer.put_layer(0, [0, 1, 2], 0, 96)
    start(vllm, receive, grant)
    vllm.step()
    vllm.call("abort_in_step" if in_step else "abort", generating)

    def leave(layer: int) -> bool:
        writer.fail()
        give_up(vllm, receive, grant)
        return True

    with Behind(vllm, 1, leave):
        vllm.hear(Freed)
    assert [notice.id for notice in vllm.notices(NotArrived)] == [receive]
    again = vllm.generate(prompt, max_tokens=4)
    assert (again["cached"], again["tokens"]) == (0, expected)


def test_one_that_is_given_up_before_vllm_has_looked(vllm: Hosted, peer: Peer) -> None:
    prompt = prompt_of(150, seed=16)
    generating, receive, grant = begin(vllm, prompt, 96)
    start(vllm, receive, grant)
    give_up(vllm, receive, grant)
    (failed,) = vllm.run(generating)
    assert failed["reason"] == "error"
    assert vllm.hear(Freed).id == receive
    assert vllm.generate(prompt)["cached"] == 0


def test_a_layer_that_is_not_what_its_writer_says(vllm: Hosted, peer: Peer) -> None:
    prompt = prompt_of(150, seed=17)
    brought = fetch(vllm, peer, prompt[:96])
    vllm.forget()
    generating, receive, grant = begin(vllm, prompt, 96)
    writer = peer.writer(vllm, grant, 0, 96)
    writer.claim()
    for layer in range(NUM_LAYERS):
        writer.put_layer(layer, brought.blocks, 0, 96)
    way = peer.heap.attach(vllm.heap.address)
    at = 2 * vllm.layout.layer_nbytes + grant.blocks[1] * vllm.layout.block_nbytes
    way.put(Copies([Copy(0, at, 64)]), 0, 0)
    start(vllm, receive, grant)
    (failed,) = vllm.run(generating)
    assert failed["reason"] == "error"
    (told,) = vllm.notices(NotArrived)
    assert "layer 2" in told.detail and "checksum" in told.detail
    writer.finish()
    give_up(vllm, receive, grant)
    vllm.hear(Freed)
    assert vllm.generate(prompt)["cached"] == 0


def test_early_starts_among_preempted_requests(vllm: Hosted, peer: Peer) -> None:
    """More is asked for than fits: 64 blocks, requests that grow to 16 each."""
    prompt = prompt_of(200, seed=18)
    brought = fetch(vllm, peer, prompt[:192])
    vllm.forget()
    expected = relay(vllm, peer, prompt, brought, 192, max_tokens=6)["tokens"]
    vllm.forget()
    crowd = [vllm.add(vllm.new_id("o"), prompt_of(200, seed=40 + i), max_tokens=300) for i in range(5)]
    generating, receive, grant = begin(vllm, prompt, 192, max_tokens=250)
    for _ in range(20):
        vllm.step()
    writer = peer.writer(vllm, grant, 0, 192)
    writer.claim()
    for layer in range(NUM_LAYERS):
        writer.put_layer(layer, brought.blocks, 0, 192)
    start(vllm, receive, grant)
    writer.finish()
    while not (arrived := vllm.notices(Arrived)):
        vllm.step()
    for _ in range(30):
        vllm.step()  # nobody has taken it yet
    vllm.heard += arrived
    finish(vllm, receive, grant)
    outputs = vllm.run(generating, *crowd)
    assert outputs[0]["tokens"][:6] == expected
    assert [len(output["tokens"]) for output in outputs] == [250, 300, 300, 300, 300, 300]
    assert vllm.call("num_preemptions") > 0
    vllm.hear(Freed)
