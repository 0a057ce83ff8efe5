"""What only heaps in a world of NVSHMEM do; the rest is in test_heap_conformance.py. No GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.heap.gpu.cuda_ipc import CudaIpcHeap
from microserve.kvcache.words import pack_state
from microserve.protocol.errors import ConfigError, TransferFailed
from microserve.protocol.messages.kv.grant import Grant
from tests.support.engine.device.host_driver import HostDriver
from tests.support.engine.device.host_world import HostWorld
from tests.support.kvcache.heap.nvshmem_ranks import Rank, make_heap
from tests.support.kvcache.kv_samples import fill, make_layout, mismatches

OPEN, CLOSED = 1, 2


class Three:
    def __init__(self) -> None:
        self.world = HostWorld(num_ranks=3)
        self.owner, self.first, self.second = (make_heap(self.world, number) for number in (1, 2, 3))
        self.peers = [heap.attach(self.owner.address) for heap in (self.first, self.second)]

    def is_held(self) -> bool:
        self.owner.poll(wait=True)
        return self.owner.is_held(0, 1)


@pytest.fixture
def three() -> Iterator[Three]:
    three = Three()
    yield three
    for peer in three.peers:
        peer.let_go(0, 1)
        peer.close()
    for heap in (three.owner, three.first, three.second):
        heap.close()


# --- lanes


def test_two_writers_that_meet_never_both_hold_a_lane(three: Three) -> None:
    results: list[bool] = []
    rank = three.first.world
    assert isinstance(rank, Rank)
    rank.between = lambda: results.append(three.peers[1].hold(0, 1))

    results.append(three.peers[0].hold(0, 1))

    # The second found the first's word; the first may have found nobody.
    assert results == [False, True]
    three.peers[0].let_go(0, 1)
    three.peers[0].poll(wait=True)
    assert three.peers[1].hold(0, 1)


def test_a_close_between_a_writer_s_word_and_its_look_is_seen_by_one_of_them(three: Three) -> None:
    state = three.owner.words.state(0)
    three.owner.store(state, OPEN)
    seen: list[bool] = []

    def close() -> None:
        three.owner.store(state, CLOSED)
        seen.append(three.is_held())

    rank = three.first.world
    assert isinstance(rank, Rank)
    rank.between = close

    assert three.peers[0].hold(0, 1)
    assert seen == [True]
    assert three.peers[0].read(state) == CLOSED


def test_the_owner_says_held_until_its_mirror_is_newer_than_its_last_store(three: Three) -> None:
    three.owner.poll(wait=True)
    assert not three.owner.is_held(0, 1)

    three.owner.store(three.owner.words.state(0), CLOSED)

    assert three.owner.load(three.owner.words.state(0)) == CLOSED
    assert three.owner.is_held(0, 1)
    assert not three.owner.is_held(1, 1)
    three.owner.poll(wait=True)
    assert not three.owner.is_held(0, 1)
    assert three.owner.load(three.owner.words.state(0)) == CLOSED


def test_a_store_is_there_for_whoever_is_told_of_it(three: Three) -> None:
    state = three.owner.words.state(0)
    three.owner.poll()  # copies of the mirror are in the stream before it

    three.owner.store(state, OPEN)

    assert [peer.read(state) for peer in three.peers] == [OPEN, OPEN]


def test_signals_are_seen_when_the_mirror_is_polled_and_no_call_waits(three: Three) -> None:
    word = three.owner.words.arrival(0, 1, 1)
    three.peers[0].signal(word, 5)
    three.peers[0].poll(wait=True)
    assert three.owner.load(word) == 0

    driver = three.owner._driver
    assert isinstance(driver, HostDriver)
    three.owner.poll()
    assert three.owner.load(word) == 0
    while driver.step_any():
        pass
    three.owner.poll()

    assert three.owner.load(word) == 5
    assert three.owner.load_each(three.owner.words.arrivals(0, 1)).tolist() == [0, 5]


def test_a_rank_that_is_reported_dead_holds_nothing(three: Three) -> None:
    assert three.peers[0].hold(0, 1)
    assert three.is_held()
    assert not three.peers[1].hold(0, 1)

    three.owner.report_dead(2)
    assert not three.is_held()
    assert not three.peers[1].hold(0, 1)
    three.second.report_dead(2)
    assert three.peers[1].hold(0, 1)
    assert three.is_held()

    three.first.report_dead(1)
    assert three.peers[0].owner_is_dead()
    with pytest.raises(TransferFailed, match="gone"):
        three.first.attach(three.owner.address)


def test_two_views_of_one_heap_do_not_share_a_lane(three: Three) -> None:
    with three.first.attach(three.owner.address) as again:
        assert three.peers[0].hold(0, 1)
        assert not again.hold(0, 1)
        three.peers[0].let_go(0, 1)
        three.peers[0].poll(wait=True)
        assert again.hold(0, 1)
        again.let_go(0, 1)


# --- the world


def test_a_rank_that_is_not_mapped_is_refused(three: Three) -> None:
    three.world.unmapped.add(0)

    with pytest.raises(TransferFailed, match="out of reach"):
        three.first.attach(three.owner.address)
    with pytest.raises(TransferFailed, match="out of reach"):
        three.first.attach(msgspec.structs.replace(three.owner.address, pid=3))


def test_a_pool_that_does_not_fit_is_said_before_anyone_waits() -> None:
    world = HostWorld(num_ranks=1)
    for layout, field in (
        (make_layout(num_blocks=1 << 12), "num_blocks"),
        (make_layout(model="m" * 5000), "model"),
    ):
        with pytest.raises(ConfigError) as caught:
            make_heap(world, 1, layout=layout)
        assert caught.value.field == field
    assert world.handles == {}


# --- engines outside of the world


def test_an_engine_outside_of_the_world_is_sent_to_and_sends_nothing_in() -> None:
    world, driver = HostWorld(num_ranks=1), HostDriver()
    layout, num_tokens = make_layout(), 7
    with (
        make_heap(world, 1, driver=driver) as inside,
        CudaIpcHeap(layout, incarnation=2, driver=HostDriver(), num_slots=2) as outside,
    ):
        grant = Grant(
            *("g", "e", 2, 1, 1, 0, num_tokens, [5, 2], layout.block_size, layout.layout_hash),
            *(outside.address, 1.0),
        )
        outside.store(outside.words.state(1), pack_state(1, OPEN))
        fill(inside, [0, 1], num_tokens, seed=3)
        with inside.attach(outside.address) as peer:
            writer = LaneWriter(inside, peer, grant, 0, 0, num_tokens)
            writer.claim()
            assert outside.is_held(1, 0)
            for layer in range(layout.num_layers):
                writer.put_layer(layer, [0, 1], 0, num_tokens)
            writer.finish()
            peer.poll(wait=True)

        assert not outside.is_held(1, 0)
        assert mismatches(outside, [5, 2], 0, 0, num_tokens, seed=3) == []
        with pytest.raises(TransferFailed, match="out of reach"):
            outside.attach(inside.address)
