"""Heaps of a host with a door of TCP, small and patient."""

from __future__ import annotations

from microserve.kvcache.heap.doors.host import HostHeap, Opening
from microserve.protocol.messages.kv.grant import HeapAddress
from tests.support.kvcache.kv_samples import make_layout


def make_heap(incarnation: int, *, shares_memory: bool = True) -> HostHeap:
    opening = Opening(["tcp"], silence_s=60.0, shares_memory=shares_memory)
    return HostHeap(make_layout(), incarnation=incarnation, num_slots=3, opening=opening)


def door_of(heap: HostHeap) -> HeapAddress:
    [address] = [each for each in (heap.address, *heap.doors) if each.kind == "tcp"]
    return address
