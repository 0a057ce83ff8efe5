"""Which way a writer takes into a heap, and who may open its doors."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable

import msgspec
import pytest

from microserve.kvcache.heap.doors import host as host_module
from microserve.kvcache.heap.doors.host import HostHeap, HostView, Opening
from microserve.kvcache.heap.doors.tcp import peer as peer_module
from microserve.kvcache.heap.doors.tcp.line import Line
from microserve.kvcache.heap.heap import Copies, Copy
from microserve.kvcache.heap.shm import ShmHeap
from microserve.protocol.errors import ConfigError, TransferFailed
from microserve.protocol.messages.kv.grant import HeapAddress
from tests.support.kvcache.heap.door_heaps import door_of, make_heap
from tests.support.kvcache.heap.heap_child import Child, wait_until
from tests.support.kvcache.heap.heap_factories import MINE, OTHERS
from tests.support.kvcache.kv_samples import POISON_BYTE, data_of, make_layout, set_data, settle

pytestmark = pytest.mark.slow


def test_memory_comes_first_and_the_door_where_memory_is_out_of_reach(
    heap: HostHeap, writer: HostHeap
) -> None:
    def kind(address: HeapAddress) -> str:
        with writer.reach(address, heap.doors) as peer:
            return peer.address.kind

    assert kind(heap.address) == "shm"
    assert kind(msgspec.structs.replace(heap.address, host="another kernel")) == "tcp"
    assert kind(msgspec.structs.replace(heap.address, pid=1 << 22)) == "tcp", "another pid namespace"
    with make_heap(OTHERS, shares_memory=False) as loner, loner.reach(heap.address, heap.doors) as peer:
        assert peer.address.kind == "tcp"
        assert [loner.address.kind, *(each.kind for each in loner.doors)] == ["tcp"]


def test_where_no_way_leads_each_says_why(heap: HostHeap, writer: HostHeap) -> None:
    elsewhere = msgspec.structs.replace(heap.address, host="another kernel")
    far = msgspec.structs.replace(door_of(heap), kind="carrier pigeon")
    with pytest.raises(TransferFailed, match=r"another kernel.*; .*carrier pigeon"):
        writer.reach(elsewhere, [far])
    with ShmHeap(make_layout(), incarnation=OTHERS) as plain:
        with pytest.raises(TransferFailed, match="out of reach of shm"):
            plain.reach(elsewhere, heap.doors)
        with plain.reach(heap.address, heap.doors) as peer:
            assert peer.address.kind == "shm"


def test_another_process_of_the_owner_s_engine_may_have_the_doors(writer: HostHeap) -> None:
    with (
        ShmHeap(make_layout(), incarnation=MINE, num_slots=3) as owner,
        HostView(owner.address, make_layout(), Opening(["tcp"])) as view,
        writer.attach(view.doors[0]) as peer,
    ):
        assert view.address == owner.address
        set_data(writer, 7)
        assert peer.hold(0, 0)
        assert owner.is_held(0, 0) and view.is_held(0, 0)
        peer.put(Copies([Copy(0, 0, 64)]))
        peer.signal(5, 9)
        peer.let_go(0, 0)
        settle(peer, owner)
        assert owner.load(5) == view.load(5) == 9
        assert (owner.read_data(0, 64) == 7).all()
        assert not owner.is_held(0, 0)
        view.close()
        wait_until(peer.owner_is_dead, "the end of the door")


def test_a_source_is_left_at_once_whatever_the_network_does(heap: HostHeap, writer: HostHeap) -> None:
    """What was put and is not out yet is copied: its blocks may have other content."""
    with writer.attach(door_of(heap)) as peer:
        for number in range(200):
            set_data(writer, number % 251)
            peer.put(Copies([Copy(0, 0, writer.layout.data_nbytes)]))
            peer.signal(5, number)
            peer.leave_source()
        set_data(writer, POISON_BYTE)
        settle(peer, heap)
        assert heap.load(5) == 199
        assert (data_of(heap) == 199).all()


def test_one_who_has_waited_for_a_door_has_waited_for_all(
    heap: HostHeap, writer: HostHeap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that has vanished costs a step some seconds once, and not with every send."""
    monkeypatch.setattr(peer_module, "ATTACH_S", 0.1)
    monkeypatch.setattr(host_module, "_LONG_S", 0.05)
    with Child("tcp", OTHERS) as child:
        child.stop()
        with pytest.raises(TransferFailed):
            writer.attach(child.address)
        monkeypatch.setattr(peer_module, "ATTACH_S", 30.0)
        with pytest.raises(TransferFailed, match="lately"):
            writer.attach(child.address)
        with writer.attach(door_of(heap)) as other:
            assert other.hold(0, 0)
            other.let_go(0, 0)
        child.signal(signal.SIGCONT)
        writer._silent.clear()
        writer.attach(child.address).close()


def test_doors_that_cannot_be_opened_are_said() -> None:
    gc.collect()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError) as caught:
        HostHeap(make_layout(), incarnation=MINE, opening=Opening(["tcp"], "203.0.113.1"))
    assert caught.value.field == "door_address"
    wrong: list[Callable[[], HostHeap]] = [
        lambda: HostHeap(make_layout(), incarnation=MINE, opening=Opening(["window"])),
        lambda: HostHeap(make_layout(), incarnation=MINE, opening=Opening(shares_memory=False)),
    ]
    for make in wrong:
        with pytest.raises(ConfigError) as caught:
            make()
        assert caught.value.field == "doors"
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_post_that_has_failed_keeps_nobody_waiting(
    heap: HostHeap, writer: HostHeap, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    address = door_of(heap)
    with writer.attach(address) as peer:
        monkeypatch.setattr(Line, "tick", fail)
        with pytest.raises(TransferFailed, match="is lost"):
            peer.hold(0, 0)
        assert peer.is_lost
    with pytest.raises(TransferFailed, match="has failed here"):
        writer.attach(address)
