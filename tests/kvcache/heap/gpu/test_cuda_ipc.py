"""What only heaps in device memory do; the rest is in test_heap_conformance.py. No GPU is needed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import find, given, settings

from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.heap.gpu.cuda_ipc import CudaIpcHeap, CudaIpcPeerHeap
from microserve.kvcache.heap.gpu.device import DeviceHeap
from microserve.kvcache.heap.heap import Copies, Copy
from microserve.kvcache.heap.memfd import lane_byte
from microserve.kvcache.words import POISON
from microserve.protocol.errors import ConfigError, InternalError, TransferFailed
from microserve.protocol.messages.kv.grant import Grant, HeapAddress
from tests.support.engine.device.host_driver import FREED_BYTE, HostDriver
from tests.support.kvcache.heap.device_schedules import LAYOUT, MakeHeap, play, schedules
from tests.support.kvcache.heap.heap_child import Child, wait_until
from tests.support.kvcache.heap.heap_factories import MINE, NUM_SLOTS, THEIRS
from tests.support.kvcache.kv_samples import POISON_BYTE, data_of, fill, make_layout, mismatches, set_data


class Pair:
    """A writer whose stream runs by hand, and an owner."""

    def __init__(self) -> None:
        self.driver = HostDriver()
        self.writer = CudaIpcHeap(make_layout(), incarnation=MINE, driver=self.driver, num_slots=NUM_SLOTS)
        self.owner = CudaIpcHeap(make_layout(), incarnation=THEIRS, driver=HostDriver(), num_slots=NUM_SLOTS)
        self.peer = self.writer.attach(self.owner.address)

    def run(self, count: int | None = None) -> None:
        """Operations of the peer's stream; all by default."""
        while count != 0 and self.driver.step(self.peer.stream):
            count = count and count - 1


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.peer.close()
    pair.writer.close()
    pair.owner.close()


# --- order and proof, whenever the streams run


def _make(heap: type[CudaIpcHeap]) -> MakeHeap:
    def make(incarnation: int, driver: HostDriver) -> DeviceHeap:
        return heap(LAYOUT, incarnation=incarnation, driver=driver, num_slots=1)

    return make


@settings(max_examples=300, deadline=None)
@given(schedules)
def test_no_count_overtakes_its_data_and_no_free_lane_has_a_write_on_its_way(schedule: list[int]) -> None:
    assert play(schedule, _make(CudaIpcHeap)) is None


class SignalsAtOnce(CudaIpcHeap):
    """Planted: words are stored by the host, not by the stream."""

    def attach(self, address: HeapAddress) -> CudaIpcPeerHeap:
        class Peer(CudaIpcPeerHeap):
            def _write(self, words: list[int], value: int) -> None:
                self._shared.values[words] = value

        return Peer(self.layout, self.data, address, self._driver)


class LetsGoAtOnce(CudaIpcHeap):
    """Planted: a lane is free for others before its writes are done."""

    def attach(self, address: HeapAddress) -> CudaIpcPeerHeap:
        class Peer(CudaIpcPeerHeap):
            def _leave(self, slot: int, lane: int) -> None:
                self._release(slot, lane)

            def poll(self, *, wait: bool = False) -> None:
                self._leaving.clear()
                super().poll(wait=wait)

        return Peer(self.layout, self.data, address, self._driver)


class TrustsLocks(CudaIpcHeap):
    """Planted: a free lock is taken for a lane without a writer."""

    def is_held(self, slot: int, lane: int) -> bool:
        if not self._file.lock(lane_byte(slot, lane)):
            return True
        self._file.unlock(lane_byte(slot, lane))
        return False


@pytest.mark.parametrize("planted", [SignalsAtOnce, LetsGoAtOnce])
def test_the_schedules_find_a_planted_bug(planted: type[CudaIpcHeap]) -> None:
    found = find(
        schedules,
        lambda schedule: play(schedule, _make(planted)) is not None,
        settings=settings(max_examples=2000, deadline=None),
        random=Random(1),
    )
    assert play(found, _make(planted)) is not None


def _is_held_by_a_dying_writer(heap: CudaIpcHeap) -> bool:
    """A writer that has lost its memfd, and so its locks, but is not gone: its device may still write."""
    with Child("cuda_ipc", THEIRS) as child:
        child.ask("attach", address=heap.address)
        assert child.ask("hold", slot=1, lane=1)
        child.ask("lose_file")
        assert not heap._file.is_locked(lane_byte(1, 1))
        is_held = heap.is_held(1, 1)
        with CudaIpcHeap(make_layout(), incarnation=MINE + 1, driver=HostDriver()) as rival:
            with rival.attach(heap.address) as peer:
                assert not peer.hold(1, 1)
            child.signal(signal.SIGKILL)
            wait_until(lambda: not heap.is_held(1, 1), "the end of a writer")
            with rival.attach(heap.address) as peer:
                if type(heap) is CudaIpcHeap:
                    assert peer.hold(1, 1)
                    peer.let_go(1, 1)
    return is_held


def test_a_dying_writer_holds_its_lane_until_it_is_gone() -> None:
    with CudaIpcHeap(make_layout(), incarnation=MINE, driver=HostDriver()) as heap:
        assert _is_held_by_a_dying_writer(heap)


def test_a_heap_that_trusts_locks_alone_is_noticed() -> None:
    with TrustsLocks(make_layout(), incarnation=MINE, driver=HostDriver()) as heap:
        assert not _is_held_by_a_dying_writer(heap)


# --- lanes and streams


def test_a_lane_is_free_when_the_stream_has_drained_and_not_before(pair: Pair) -> None:
    set_data(pair.writer, 7)
    assert pair.peer.hold(0, 0)
    pair.peer.put(Copies([Copy(0, 0, pair.writer.layout.data_nbytes)]))
    pair.peer.let_go(0, 0)
    pair.peer.poll()
    assert pair.peer.holds(0, 0)
    assert not pair.peer.is_idle
    assert not pair.peer.hold(0, 0)

    pair.run(1)
    pair.peer.poll()
    assert pair.owner.is_held(0, 0)
    assert set(data_of(pair.owner).tolist()) == {0, 7}

    pair.run()
    assert pair.owner.is_held(0, 0)
    pair.peer.poll()
    assert not pair.owner.is_held(0, 0)
    assert pair.peer.is_idle
    assert pair.peer.hold(0, 0)
    pair.peer.let_go(0, 0)


def test_a_lane_that_nothing_went_through_is_free_at_once_whatever_the_stream_does(pair: Pair) -> None:
    assert pair.peer.hold(0, 0)
    pair.peer.put(Copies([Copy(0, 0, 8)]))
    assert pair.peer.hold(0, 1)
    pair.peer.let_go(0, 1)

    assert not pair.peer.holds(0, 1)
    assert not pair.owner.is_held(0, 1)
    assert pair.peer.hold(0, 1)
    pair.peer.signal(1, 1)
    pair.peer.let_go(0, 1)
    pair.peer.let_go(0, 0)
    assert pair.owner.is_held(0, 1)


def test_a_stream_that_fails_keeps_its_lanes(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(event: int) -> bool:
        raise InternalError("cuEventQuery failed: an illegal memory access (700)")

    pair.peer.hold(0, 0)
    pair.peer.signal(0, 1)
    pair.peer.let_go(0, 0)
    pair.run()
    with monkeypatch.context() as patch:
        patch.setattr(pair.driver, "is_done", fail)
        for wait in (False, True):
            with pytest.raises(InternalError, match="illegal"):
                pair.peer.poll(wait=wait)
        assert pair.owner.is_held(0, 0)
        assert not pair.peer.is_idle


def test_puts_follow_the_stream_that_computes_their_source(pair: Pair) -> None:
    layout = pair.writer.layout
    computing = pair.driver.create_stream()
    result = np.full(layout.data_nbytes, 9, np.uint8)
    pair.driver.copy(pair.writer.data.address, result.ctypes.data, result.nbytes, computing)
    pair.peer.follow(computing)
    pair.peer.put(Copies([Copy(0, 0, layout.data_nbytes)]))
    pair.peer.signal(0, 1)

    pair.run()
    assert pair.owner.load(0) == 0

    while pair.driver.step(computing):
        pass
    pair.run()
    assert pair.owner.load(0) == 1
    assert (data_of(pair.owner) == 9).all()


def test_a_transfer_s_source_is_in_use_until_it_is_drained(pair: Pair) -> None:
    layout = pair.owner.layout
    num_tokens = 2 * layout.block_size
    grant = Grant(
        grant_id="g",
        engine_id="e",
        incarnation=THEIRS,
        slot=1,
        generation=1,
        matched=0,
        end=num_tokens,
        blocks=[5, 2],
        block_size=layout.block_size,
        layout_hash=layout.layout_hash,
        heap=pair.owner.address,
        lease_s=1.0,
    )
    pair.owner.store(pair.owner.words.state(1), 1 << 8 | 1)
    fill(pair.writer, [0, 1], num_tokens, seed=3)
    writer = LaneWriter(pair.writer, pair.peer, grant, 0, 0, num_tokens)
    writer.claim()
    for layer in range(layout.num_layers):
        writer.put_layer(layer, [0, 1], 0, num_tokens)
    writer.finish()
    assert not writer.is_drained
    assert pair.owner.load(pair.owner.words.claim(1, 0)) == 0

    pair.run()
    assert not writer.is_drained
    pair.peer.poll()

    assert writer.is_drained
    set_data(pair.writer, POISON_BYTE)
    assert mismatches(pair.owner, [5, 2], 0, 0, num_tokens, seed=3) == []


def test_a_stream_waits_for_a_word_and_is_let_go_by_poison(pair: Pair) -> None:
    driver = pair.owner._driver
    assert isinstance(driver, HostDriver)
    waiting = driver.create_stream()
    word = pair.owner.words.arrival(0, 0, 0)
    pair.owner.enqueue_wait(waiting, word, 5)
    pair.peer.signal(word, 4)
    pair.run()
    assert not driver.step(waiting)
    pair.peer.signal(word, 6)
    pair.run()
    assert driver.step(waiting)

    pair.owner.enqueue_wait(waiting, word, 7)
    assert not driver.step(waiting)
    pair.owner.poison(word)
    assert driver.step(waiting)
    assert pair.owner.load(word) == POISON | 6


# --- memory


def test_memory_that_a_peer_has_open_is_not_freed() -> None:
    pair = Pair()
    pair.owner.write_data(0, np.full(8, 5, np.uint8))
    pair.owner.close()

    pair.peer.put(Copies([Copy(0, 64, 8)]))
    pair.peer.poll(wait=True)

    target = pair.driver._memories[pair.peer.target_address]
    assert target.view[:8].tolist() == [5] * 8
    assert FREED_BYTE not in target.view
    pair.peer.close()
    pair.writer.close()


def test_views_of_the_data_outlive_the_heap() -> None:
    driver = HostDriver()
    heap = CudaIpcHeap(make_layout(), incarnation=MINE, driver=driver)
    view = heap.data
    interface = view.__cuda_array_interface__
    assert interface["shape"] == (heap.layout.data_nbytes,)
    assert interface["data"] == (view.address, False)

    heap.close()
    assert view.address in driver._memories
    del view, heap
    assert driver._memories == {}


def test_memory_that_is_gone_is_refused_and_leaves_nothing() -> None:
    with (
        CudaIpcHeap(make_layout(), incarnation=MINE, driver=HostDriver()) as mine,
        CudaIpcHeap(make_layout(), incarnation=THEIRS, driver=(driver := HostDriver())) as theirs,
    ):
        before = os.listdir("/proc/self/fd")
        memory = driver._memories[theirs.data.address]
        moved = os.dup(memory.fd)
        os.close(memory.fd)
        try:
            with pytest.raises(TransferFailed, match="handle"):
                mine.attach(theirs.address)
            assert not theirs._file.is_locked(1 << 40)
        finally:
            os.dup2(moved, memory.fd)
            os.close(moved)
        assert sorted(os.listdir("/proc/self/fd")) == sorted(before)


def test_too_little_device_memory_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = HostDriver()

    def fail(nbytes: int) -> int:
        raise ConfigError(f"no {nbytes} bytes on the device", field="num_blocks")

    with monkeypatch.context() as patch:
        patch.setattr(driver, "allocate", fail)
        with pytest.raises(ConfigError) as caught:
            CudaIpcHeap(make_layout(), incarnation=MINE, driver=driver)
    assert caught.value.field == "num_blocks"

    with pytest.raises(ConfigError):
        CudaIpcHeap(make_layout(model="m" * 5000), incarnation=MINE, driver=driver)
    assert driver._memories == {}


def test_a_heap_of_another_kind_is_refused_whatever_its_address_says() -> None:
    from microserve.kvcache.heap.shm import ShmHeap

    with (
        CudaIpcHeap(make_layout(), incarnation=MINE, driver=HostDriver()) as mine,
        ShmHeap(make_layout(), incarnation=THEIRS) as shm,
    ):
        with pytest.raises(TransferFailed):
            mine.attach(msgspec.structs.replace(shm.address, kind="cuda_ipc"))
        with pytest.raises(TransferFailed):
            shm.attach(msgspec.structs.replace(mine.address, kind="shm"))
