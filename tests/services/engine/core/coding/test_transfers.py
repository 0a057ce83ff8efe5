"""Whole transfers by a codec between two cores: every token is right, however the prompt is cut, and every
block comes back. Rows are hashes of what stands before them (hash_runner.py), so a wrong byte shows."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from microserve.kvcache.codec.codec import SUPPORTED
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.heap.local import MemoryHeap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import InvalidRequest
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.coding import Coding
from microserve.services.engine.core.batch import Runner
from microserve.services.engine.core.coding.choice import CodecOptions
from microserve.services.simulation.engine.hash_runner import HashRunner
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

WIDTH = 16
LOSSLESS = "lossless-zstd"


class CodingMesh(Mesh):
    codecs = CodecOptions(num_threads=0)


def wide(prompt: list[int]) -> list[int]:
    return expect(prompt, width=WIDTH)


@pytest.fixture
def mesh() -> Iterator[CodingMesh]:
    mesh = CodingMesh(width=WIDTH)
    yield mesh
    mesh.close()


def sent_of(mesh: Mesh, call: int) -> wire.Sent:
    reply = mesh.a.replies[call]
    assert isinstance(reply, wire.Sent), reply
    return reply


def coding_of(mesh: Mesh, call: int) -> Coding:
    coding = sent_of(mesh, call).coding
    assert coding is not None
    return coding


@pytest.mark.parametrize("codec", [LOSSLESS, "lossless-rans"])
@pytest.mark.parametrize("length", [8, 33, 50])
def test_a_prompt_that_went_by_a_codec_gives_the_tokens_that_it_always_gave(
    mesh: CodingMesh, codec: str, length: int
) -> None:
    """Of 33 or 50 tokens a step computes 16, which ends inside of a block."""
    prompt = prompt_of(length)
    granted = grant_for(mesh.b, "r", prompt, length - 1)
    assert granted.grant.decoding is not None
    assert granted.grant.decoding.codecs == list(SUPPORTED)
    call = send(mesh.a, "r", prompt, granted, 0, length - 1, codec=codec)
    receive(mesh.b, "r", granted, length - 1)
    mesh.run()

    assert mesh.b.tokens["r"] == wide(prompt)
    assert mesh.b.finished["r"].numerics == mesh.b.core.numerics
    coding = coding_of(mesh, call)
    assert (coding.profile, coding.reason, coding.is_lossy) == (codec, "asked", False)
    assert coding.raw_nbytes == 2 * 2 * (length - 1) * 8 * WIDTH
    assert coding.wire_nbytes == sent_of(mesh, call).nbytes <= coding.raw_nbytes
    if codec == LOSSLESS:
        assert coding.wire_nbytes < coding.raw_nbytes


def test_received_kv_that_lost_nothing_is_prefix_cache_like_any(mesh: CodingMesh) -> None:
    prompt = prompt_of(40)
    granted = grant_for(mesh.b, "r", prompt, 40)
    send(mesh.a, "r", prompt, granted, 0, 40, codec=LOSSLESS)
    call = mesh.call()
    message = wire.Commit(call, "r", granted.grant.grant_id, 60.0)
    mesh.b.core.actions.commit(ROUTER, message, mesh.now)
    mesh.run()

    assert mesh.b.replies[call] == wire.Committed(call, 40)
    generate(mesh.b, "again", prompt)
    mesh.run()
    assert mesh.b.tokens["again"] == wide(prompt)
    assert mesh.b.finished["again"].usage.cached_tokens == 40


def test_a_first_token_comes_beside_payloads(mesh: CodingMesh) -> None:
    prompt = prompt_of(29)
    granted = grant_for(mesh.b, "r", prompt, 29)
    call = send(mesh.a, "r", prompt, granted, 0, 29, sampling=GREEDY, codec=LOSSLESS)
    receive(mesh.b, "r", granted, 29, await_first=True)
    mesh.run()
    first = sent_of(mesh, call).first_token
    assert first is not None
    assert [first, *mesh.b.tokens["r"][1:]] == wide(prompt)


def test_lanes_of_both_kinds_bring_one_prompt(mesh: CodingMesh) -> None:
    prompt = prompt_of(48)
    granted = grant_for(mesh.b, "r", prompt, 47)
    calls = [
        send(mesh.a, "r", prompt, granted, 0, 16, lane=0, codec=LOSSLESS),
        send(mesh.a, "r", prompt, granted, 16, 32, lane=1),
        send(mesh.a, "r", prompt, granted, 32, 47, lane=2, codec=LOSSLESS),
    ]
    receive(mesh.b, "r", granted, 47)
    mesh.run()
    assert mesh.b.tokens["r"] == wide(prompt)
    assert sent_of(mesh, calls[1]).coding is None
    assert all(coding_of(mesh, calls[lane]).profile == LOSSLESS for lane in (0, 2))


def test_lanes_that_share_tokens_fail_the_request_where_one_is_encoded(mesh: CodingMesh) -> None:
    prompt = prompt_of(32)
    granted = grant_for(mesh.b, "r", prompt, 32)
    send(mesh.a, "r", prompt, granted, 16, 32, lane=1)
    send(mesh.a, "r", prompt, granted, 0, 32, lane=0, codec=LOSSLESS)
    receive(mesh.b, "r", granted, 32)
    mesh.run()
    mesh.now += 1.0
    mesh.run()
    assert mesh.b.finished["r"].code == "transfer_failed"
    assert not mesh.b.tokens["r"]


def test_a_bound_inside_a_block_goes_as_it_is(mesh: CodingMesh) -> None:
    prompt = prompt_of(32)
    granted = grant_for(mesh.b, "r", prompt, 30)
    calls = [
        send(mesh.a, "r", prompt, granted, 0, 18, lane=0, codec=LOSSLESS),
        send(mesh.a, "r", prompt, granted, 18, 30, lane=1, codec=LOSSLESS),
    ]
    receive(mesh.b, "r", granted, 30)
    mesh.run()
    assert mesh.b.tokens["r"] == wide(prompt)
    for call in calls:
        coding = coding_of(mesh, call)
        assert coding.wire_nbytes == coding.raw_nbytes
        assert (coding.profile, coding.reason) == ("none", "refused")


def test_kv_that_gets_no_smaller_goes_as_it_is() -> None:
    mesh = CodingMesh()  # rows of one hash each
    prompt = prompt_of(32)
    granted = grant_for(mesh.b, "r", prompt, 31)
    call = send(mesh.a, "r", prompt, granted, 0, 31, codec=LOSSLESS)
    receive(mesh.b, "r", granted, 31)
    mesh.run()
    assert mesh.b.tokens["r"] == expect(prompt)
    coding = coding_of(mesh, call)
    assert coding.wire_nbytes == coding.raw_nbytes
    mesh.close()


def test_an_engine_starts_early_on_layers_that_are_decoded(mesh: CodingMesh) -> None:
    prompt = prompt_of(33)
    granted = grant_for(mesh.b, "r", prompt, 16)
    send(mesh.a, "r", prompt, granted, 0, 16, codec=LOSSLESS)
    receive(mesh.b, "r", granted, 16)
    mesh.run()
    assert mesh.b.tokens["r"] == wide(prompt)


def test_a_preempted_send_goes_on_where_it_was() -> None:
    mesh = CodingMesh(width=WIDTH, num_blocks=24, max_num_batched_tokens=8)
    prompt = prompt_of(60)
    granted = grant_for(mesh.b, "r", prompt, 40)
    call = send(mesh.a, "r", prompt, granted, 0, 40, codec=LOSSLESS)
    receive(mesh.b, "r", granted, 40)
    mesh.a.step()
    mesh.a.step()
    [sending] = [s for s in mesh.a.core.state.scheduler.running if s.is_send]
    with mesh.a.core.lock:
        step = mesh.a.core.stepper.next_step(mesh.now)
        assert step is not None
        mesh.a.core.state.inflight = []
        mesh.a.core.state.scheduler.preempt(sending, step)
    mesh.run()
    assert mesh.b.tokens["r"] == wide(prompt)
    assert coding_of(mesh, call).wire_nbytes < coding_of(mesh, call).raw_nbytes
    mesh.close()


def test_an_aborted_send_leaves_nothing(mesh: CodingMesh) -> None:
    prompt = prompt_of(60)
    granted = grant_for(mesh.b, "r", prompt, 59)
    send(mesh.a, "r", prompt, granted, 0, 59, codec=LOSSLESS)
    receive(mesh.b, "r", granted, 59)
    mesh.a.step()
    mesh.b.step()
    with mesh.a.core.lock:
        mesh.a.core.actions.abort(ROUTER, wire.Abort(mesh.call(), "r"), mesh.now)
    mesh.run()
    mesh.now += 1.0
    mesh.run()
    assert mesh.b.finished["r"].code == "transfer_failed"


def test_names_that_are_not_known_are_refused(mesh: CodingMesh) -> None:
    prompt = prompt_of(16)
    granted = grant_for(mesh.b, "r", prompt, 15)
    for codec in ("nonesuch", "x" * 200):
        with pytest.raises(InvalidRequest) as caught:
            send(mesh.a, "r", prompt, granted, 0, 15, codec=codec)
        assert caught.value.field == "codec"
    mesh.a.assert_clean()


def test_a_receiver_of_before_is_sent_kv_as_it_is(mesh: CodingMesh) -> None:
    prompt = prompt_of(24)
    granted = grant_for(mesh.b, "r", prompt, 23)
    old = msgspec.structs.replace(granted, grant=msgspec.structs.replace(granted.grant, decoding=None))
    call = send(mesh.a, "r", prompt, old, 0, 23, codec=LOSSLESS)
    receive(mesh.b, "r", granted, 23)
    mesh.run()
    assert mesh.b.tokens["r"] == wide(prompt)
    coding = coding_of(mesh, call)
    assert (coding.profile, coding.reason) == ("none", "refused")
    assert coding.wire_nbytes == coding.raw_nbytes


def test_engines_without_codecs_say_so() -> None:
    mesh = Mesh()
    prompt = prompt_of(24)
    granted = grant_for(mesh.b, "r", prompt, 23)
    assert granted.grant.decoding is None
    call = send(mesh.a, "r", prompt, granted, 0, 23, codec="auto")
    receive(mesh.b, "r", granted, 23)
    mesh.run()
    assert mesh.b.tokens["r"] == expect(prompt)
    assert coding_of(mesh, call).reason == "refused"
    mesh.close()


class InOtherMemory(MemoryHeap):
    """As a GPU's."""

    host_data = None  # type: ignore[assignment]


class OtherMemoryMesh(CodingMesh):
    def equip(self, layout: KvLayout, incarnation: int, num_slots: int) -> tuple[Heap, Runner, int | None]:
        heap = InOtherMemory(layout, incarnation=incarnation, registry=self.registry, num_slots=num_slots)
        return heap, HashRunner(heap.data, layout, vocab_size=VOCAB), None


def test_a_heap_that_is_not_in_host_memory_offers_none_and_sends_kv_as_it_is() -> None:
    mesh = OtherMemoryMesh(width=WIDTH)
    prompt = prompt_of(24)
    granted = grant_for(mesh.b, "r", prompt, 23)
    assert granted.grant.decoding is None
    call = send(mesh.a, "r", prompt, granted, 0, 23, codec=LOSSLESS)
    receive(mesh.b, "r", granted, 23)
    mesh.run()
    assert mesh.b.tokens["r"] == wide(prompt)
    assert coding_of(mesh, call).reason == "refused"
    mesh.close()


def test_a_grant_s_leave_to_lose_is_asked_for_once(mesh: CodingMesh) -> None:
    prompt = prompt_of(24)
    granted = grant_for(mesh.b, "r", prompt, 23)
    assert grant_for(mesh.b, "r", prompt, 23).grant == granted.grant
    with pytest.raises(InvalidRequest) as caught:
        grant_for(mesh.b, "r", prompt, 23, may_lose=True)
    assert caught.value.field == "may_lose"
