"""Sends from both sides of the connector, between two heaps, in any chunks; without vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
from hypothesis import given

from microserve.kvcache.heap.local import MemoryHeap, MemoryRegistry
from microserve.services.engine.vllm.connector.putting import Putting
from microserve.services.engine.vllm.connector.scheduler_side import SchedulerSide
from microserve.services.engine.vllm.link import Send, SendFailed, Sent, params_of
from microserve.services.engine.vllm.link_ends import End, Front
from tests.support.vllm.sending_world import SIZE, World, assert_arrived, layout_of


def make_world() -> Iterator[World]:
    registry = MemoryRegistry()
    front = Front(incarnation=1, model="m", revision="r", num_receives=4, grant_slots=4, checksums=True)
    with (
        End(front.address, "worker") as link,
        MemoryHeap(layout_of(12), incarnation=1, registry=registry) as sender,
        MemoryHeap(layout_of(8), incarnation=2, registry=registry) as receiver,
    ):
        sender.data[:] = np.random.default_rng(1).integers(0, 256, sender.data.size, np.uint8)
        putting = Putting(sender, link, lambda: 0.0)
        yield World(front, sender, receiver, putting)
        putting.close()
    front.close()


@pytest.fixture
def world() -> Iterator[World]:
    yield from make_world()


@given(
    end=st.integers(1, 8 * SIZE),
    cuts=st.sets(st.integers(1, 8 * SIZE), max_size=4),
    hit=st.integers(0, 3),
    hooks=st.integers(0, 2),
)
def test_whatever_vllm_schedules_all_arrives(end: int, cuts: set[int], hit: int, hooks: int) -> None:
    """Any chunks, any hit in vLLM's own cache, and layers whose hook does not come."""
    for world in make_world():
        grant = world.grant(end)
        request_id = world.send(grant)
        computed = min(hit * SIZE, (end - 1) // SIZE * SIZE)
        for cut in sorted({each for each in cuts if computed < each < end} | {end}):
            world.step(request_id, computed, cut - computed, hooks)
            computed = cut
        num_blocks = world.sender.layout.num_blocks_for(end)
        nbytes = num_blocks * world.sender.layout.block_nbytes * 2
        assert world.hear() == [Sent(1, nbytes, 0.0, "memory")]
        assert_arrived(world, grant)
        assert not world.receiver.is_held(grant.slot, 0)


def test_its_blocks_are_vllms_again_when_its_request_has_ended_and_nothing_is_on_its_way(
    world: World,
) -> None:
    grant = world.grant(9)
    request_id = world.send(grant)
    world.step(request_id, 0, 9)
    assert world.putting.drained() == set()
    assert world.sends.finished(request_id, 17)
    world.putting.end(world.sends.take_ended())
    assert world.putting.drained() == {request_id}
    assert world.putting.drained() == set()


def test_the_first_token_is_in_the_lane_before_it_is_let_go(world: World) -> None:
    grant = world.grant(9)
    request_id = world.send(grant, first=True)
    world.step(request_id, 0, 9)
    assert world.receiver.is_held(grant.slot, 0)
    assert world.hear() == []
    world.sends.finished(request_id, 17)
    world.putting.end(world.sends.take_ended())
    assert world.table.first_token(grant.grant_id) == 17
    assert not world.receiver.is_held(grant.slot, 0)
    assert [type(notice) for notice in world.hear()] == [Sent]


@pytest.mark.parametrize("computed", [4, 9])
def test_an_abort_tells_the_receiver_and_lets_go(world: World, computed: int) -> None:
    """In the middle, or when only the first token is missing."""
    grant = world.grant(9)
    request_id = world.send(grant, first=True)
    world.step(request_id, 0, computed)
    assert world.sends.finished(request_id, None)
    world.putting.end(world.sends.take_ended())
    assert world.putting.drained() == {request_id}
    assert "gave up" in (world.table.poisoned(grant.grant_id) or "")
    assert not world.receiver.is_held(grant.slot, 0)
    assert [type(notice) for notice in world.hear()] == [SendFailed]


def test_an_abort_before_the_first_step(world: World) -> None:
    request_id = world.send(world.grant(9))
    assert not world.sends.finished(request_id, None)
    assert world.sends.take_ended() == []
    assert [type(notice) for notice in world.hear()] == [SendFailed]


def test_a_receivers_refusal_ends_the_send_and_not_the_step(world: World) -> None:
    open_grant, closed = world.grant(9), world.grant(9)
    one, other = world.send(closed, send=1), world.send(open_grant, send=2)
    world.step(one, 0, 5)
    world.table.close(closed.grant_id, 0.0)
    parts = [world.sends.part(one, 5, 4, world.source), world.sends.part(other, 0, 9, world.source)]
    world.putting.begin_step([part for part in parts if part is not None])
    for layer in range(2):
        world.putting.put_layer(layer)
    world.putting.end_step()
    failed, sent = world.hear()
    assert isinstance(failed, SendFailed) and (failed.id, failed.code) == (1, "transfer_failed")
    assert isinstance(sent, Sent) and sent.id == 2
    assert_arrived(world, open_grant)
    assert not world.receiver.is_held(closed.slot, 0)
    # Its request goes on until it is aborted, and that is no second failure.
    assert world.sends.finished(one, None)
    world.putting.end(world.sends.take_ended())
    assert world.putting.drained() == {one}
    assert world.hear() == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"layout_hash": "other"}, "transfer_failed"),
        ({"slot": 9999}, "invalid_request"),
        ({"blocks": [0, 0, 1]}, "invalid_request"),
    ],
)
def test_a_grant_that_does_not_fit_is_refused_before_a_byte_moves(
    world: World, change: dict[str, object], code: str
) -> None:
    grant = world.grant(9)
    before = world.receiver.data.copy()
    request_id = world.send(msgspec.structs.replace(grant, **change))
    world.step(request_id, 0, 9)
    (notice,) = world.hear()
    assert isinstance(notice, SendFailed) and notice.code == code
    assert np.array_equal(world.receiver.data, before)


def test_a_grant_that_does_not_decode_and_one_whose_owner_is_gone(world: World) -> None:
    world.sends.add("x", Send(1, 0, 9, 0, b"\xc1"))
    world.step("x", 0, 9)
    grant = world.grant(9)
    gone = msgspec.structs.replace(grant, heap=msgspec.structs.replace(grant.heap, incarnation=55))
    world.step(world.send(gone, send=2), 0, 9)
    codes = [notice.code for notice in world.hear() if isinstance(notice, SendFailed)]
    assert codes == ["invalid_request", "transfer_failed"]


def test_two_senders_of_one_lane(world: World) -> None:
    grant = world.grant(9)
    one, other = world.send(grant, send=1), world.send(grant, send=2)
    world.step(one, 0, 5)
    world.step(other, 0, 9)
    world.step(one, 5, 4)
    failed, sent = world.hear()
    assert isinstance(failed, SendFailed) and "held" in failed.detail and failed.id == 2
    assert isinstance(sent, Sent)
    assert_arrived(world, grant)


def test_a_preempted_send_goes_on_where_it_was(world: World) -> None:
    grant = world.grant(20)
    request_id = world.send(grant)
    world.step(request_id, 0, 10)
    assert not world.sends.is_preempted(request_id, 0)
    assert world.sends.is_preempted(request_id, 1)
    assert not world.sends.is_preempted(request_id, 1)
    for computed in (0, 6):
        world.step(request_id, computed, 6)
    world.step(request_id, 12, 8)
    assert [type(notice) for notice in world.hear()] == [Sent]
    assert_arrived(world, grant)


def test_orders_of_the_scheduler_from_vllms_requests(world: World) -> None:
    """What vLLM's scheduler has of a request becomes parts, an end, and the words of the page."""
    grant = world.grant(20)
    with End(world.front.address, "scheduler") as link:
        side = SchedulerSide(link, SIZE, lambda: None)
        request = VllmRequest("a", params_of(Send(7, 0, 20, 0, msgspec.msgpack.encode(grant))))
        side.new_request(request)
        cache = SimpleNamespace(
            get_block_ids=lambda request_id: (world.source,),
            block_pool=SimpleNamespace(get_num_free_blocks=lambda: 3),
        )
        request.num_computed_tokens = 8  # found in vLLM's own cache
        (part,) = side.orders({"a": 5, "stranger": 1}, cache).parts
        assert (part.send.id, part.lo, part.hi, part.blocks) == (7, 0, 13, world.source)
        request.num_computed_tokens, request.num_preemptions = 0, 1
        orders = side.orders({}, cache)
        assert orders.is_preempting and orders.parts == []
        (part,) = side.orders({"a": 20}, cache).parts
        assert (part.lo, part.hi) == (13, 20)
        request.output_token_ids = [41]
        assert side.finished(request, world.source)
        assert [(each.id, each.first_token) for each in side.orders({}, cache).ended] == [(7, 41)]
        assert side.orders({}, cache).ended == []
        assert world.front.page.progress() == (5, 0, 3, 0, 0)


@dataclass
class VllmRequest:
    """As much of vLLM's as is looked at."""

    request_id: str
    kv_transfer_params: dict[str, object]
    num_prompt_tokens: int = 20
    num_computed_tokens: int = 0
    num_preemptions: int = 0
    output_token_ids: list[int] = field(default_factory=list)
