"""Sends to other hosts: what was put is still on its way when the step has ended."""

from __future__ import annotations

import time

import numpy as np

from microserve.kvcache.heap.doors.host import HostHeap, Opening
from microserve.services.engine.vllm.connector.putting import Putting
from microserve.services.engine.vllm.link import SendFailed, Sent
from microserve.services.engine.vllm.link_ends import End, Front
from tests.support.vllm.sending_world import World, layout_of


def test_a_send_through_a_door_of_another_host() -> None:
    """Its puts go on when a step has ended: until they are there its blocks are not vLLM's."""
    front = Front(incarnation=1, model="m", revision="r", num_receives=4, grant_slots=4, checksums=True)
    with (
        End(front.address, "worker") as link,
        HostHeap(layout_of(12), incarnation=1) as sender,
        HostHeap(layout_of(8), incarnation=2, opening=Opening(["tcp"], shares_memory=False)) as receiver,
    ):
        sender.back(0, 12)
        receiver.back(0, 8)
        sender.data[:] = np.random.default_rng(1).integers(0, 256, sender.data.size, np.uint8)
        world = World(front, sender, receiver, Putting(sender, link, time.monotonic))
        grant = world.grant(30)
        assert grant.heap.kind == "tcp"
        request_id = world.send(grant, first=True)
        world.step(request_id, 0, 13)
        world.step(request_id, 13, 17)
        world.putting.wait()  # nothing is read from its blocks any more
        world.sender.data[:] = 0
        assert world.sends.finished(request_id, 5)
        world.putting.end(world.sends.take_ended())
        assert drain(world) == {request_id}
        (sent,) = world.hear()
        assert isinstance(sent, Sent) and sent.heap == "tcp"
        assert world.table.is_complete(grant.grant_id)
        for layer in range(2):
            world.table.verify(grant.grant_id, layer)
        assert world.table.first_token(grant.grant_id) == 5
        assert not receiver.is_held(grant.slot, 0)
        world.putting.close()
    front.close()


def test_a_door_that_is_lost_fails_the_send_and_frees_its_blocks() -> None:
    front = Front(incarnation=1, model="m", revision="r", num_receives=4, grant_slots=4, checksums=True)
    with (
        End(front.address, "worker") as link,
        HostHeap(layout_of(12), incarnation=1) as sender,
        HostHeap(layout_of(8), incarnation=2, opening=Opening(["tcp"], shares_memory=False)) as receiver,
    ):
        sender.back(0, 12)
        receiver.back(0, 8)
        world = World(front, sender, receiver, Putting(sender, link, time.monotonic))
        request_id = world.send(world.grant(9), first=True)
        world.step(request_id, 0, 9)
        receiver.close()
        world.sends.finished(request_id, 5)
        world.putting.end(world.sends.take_ended())
        assert drain(world) == {request_id}
        assert [type(notice) for notice in world.hear()] == [SendFailed]
        world.putting.close()
    front.close()


def drain(world: World) -> set[str]:
    """Steps without work, until a request's blocks may be overwritten."""
    give_up_at = time.monotonic() + 60
    while not (drained := world.putting.drained()) and time.monotonic() < give_up_at:
        world.putting.end_step()
    return drained
