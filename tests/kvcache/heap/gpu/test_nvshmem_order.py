"""A world's heaps under every order of their streams: what is seen, and what a free lane proves."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random

import numpy as np
import pytest
from hypothesis import find, given, settings
from numpy.typing import NDArray

from microserve.kvcache.heap.gpu.nvshmem import NvshmemHeap, NvshmemPeerHeap
from microserve.protocol.messages.kv.grant import HeapAddress
from tests.support.engine.device.host_driver import HostDriver
from tests.support.engine.device.host_world import HostWorld
from tests.support.kvcache.heap.device_schedules import LAYOUT, MakeHeap, play, schedules
from tests.support.kvcache.heap.heap_stress import receive_random, send_random
from tests.support.kvcache.heap.nvshmem_ranks import make_heap


def _make(heap: type[NvshmemHeap]) -> MakeHeap:
    worlds: list[HostWorld] = []

    def make(incarnation: int, driver: HostDriver) -> NvshmemHeap:
        if not worlds or len(worlds[-1].handles) == 3:
            worlds.append(HostWorld(num_ranks=3))
        return make_heap(worlds[-1], incarnation, heap=heap, driver=driver, layout=LAYOUT)

    return make


@settings(max_examples=150, deadline=None)
@given(schedules)
def test_no_count_overtakes_its_data_and_no_free_lane_has_a_write_on_its_way(schedule: list[int]) -> None:
    assert play(schedule, _make(NvshmemHeap)) is None


class LetsGoBeside(NvshmemHeap):
    """Planted: a lane is let go on another stream than the one that writes."""

    def attach(self, address: HeapAddress) -> NvshmemPeerHeap:
        class Peer(NvshmemPeerHeap):
            def _leave(self, slot: int, lane: int) -> None:
                self._signal_holder(slot, lane, 0, self._asking)
                self._driver.synchronize(self._asking)

        return Peer(self, address, self._driver)


class SignalsBeside(NvshmemHeap):
    """Planted: words are written on another stream than the data."""

    def attach(self, address: HeapAddress) -> NvshmemPeerHeap:
        class Peer(NvshmemPeerHeap):
            def _write(self, words: list[int], value: int) -> None:
                addresses = [self._mapped + self._places.word(word) for word in words]
                self._driver.write_values(addresses, value, self._asking)
                self._driver.synchronize(self._asking)

        return Peer(self, address, self._driver)


@pytest.mark.parametrize("planted", [LetsGoBeside, SignalsBeside])
def test_the_schedules_find_a_planted_bug(planted: type[NvshmemHeap]) -> None:
    find(
        schedules,
        lambda schedule: play(schedule, _make(planted)) is not None,
        settings=settings(max_examples=2000, deadline=None),
        random=Random(1),
    )


class TakesTheFirstCopy(NvshmemHeap):
    """Planted: a mirror is believed whatever its second copy says."""

    def _is_still(self) -> NDArray[np.bool_]:
        return np.ones(len(self._mirror.words), np.bool_)


def play_words(schedule: list[int], heap: type[NvshmemHeap]) -> str | None:
    """A writer stores into two words of a slot, one after the other, while the owner's mirror is copied in
    halves; whoever reads the second word must find the first."""
    world = HostWorld(num_ranks=2)
    with (
        # One slot, so that half of a copy is half of a slot.
        make_heap(world, 1, heap=heap, layout=LAYOUT, num_slots=1) as owner,
        make_heap(world, 2, layout=LAYOUT, num_slots=1) as writer,
        writer.attach(owner.address) as peer,
    ):
        before, after = owner.words.claim(0, 0), owner.words.num_slot_words - 1
        drivers = [owner._driver, writer._driver]
        number = 0
        for action in schedule:
            match action:
                case 0:
                    number += 1
                    peer.signal(before, number)
                    peer.signal(after, number)
                case 1:
                    owner.poll()
                case _:
                    driver = drivers[action % 2]
                    assert isinstance(driver, HostDriver)
                    driver.step_any()
            if (last := owner.load(after)) > (first := owner.load(before)):
                return f"{last} is there, and before it only {first}"
    return None


@settings(max_examples=300, deadline=None)
@given(schedules)
def test_who_sees_a_word_sees_what_was_stored_before(schedule: list[int]) -> None:
    assert play_words(schedule, NvshmemHeap) is None


def test_one_copy_alone_is_found_to_break_the_order() -> None:
    find(
        schedules,
        lambda schedule: play_words(schedule, TakesTheFirstCopy) is not None,
        settings=settings(max_examples=5000, deadline=None),
        random=Random(1),
    )


class LooksAtHoldersLast(NvshmemHeap):
    """Planted: the mirror's words may be older than what it says of their holders."""

    def poll(self, *, wait: bool = False) -> None:
        holders, *words = self._mirror._parts
        self._mirror._parts = (*words, holders)  # type: ignore[assignment]
        super().poll(wait=wait)
        self._mirror._parts = (holders, *words)  # type: ignore[assignment]


def play_lanes(schedule: list[int], heap: type[NvshmemHeap]) -> str | None:
    """A writer holds a lane, counts, and lets go; an owner that saw it hold, and sees it gone, must have the
    count. 0 and 1: the owner polls; 2: its device does a step; 3: the writer's does."""
    world = HostWorld(num_ranks=2)
    with (
        make_heap(world, 1, heap=heap, layout=LAYOUT, num_slots=1) as owner,
        make_heap(world, 2, layout=LAYOUT, num_slots=1) as writer,
        writer.attach(owner.address) as peer,
    ):
        arrival = owner.words.arrival(0, 0, 0)
        drivers = [owner._driver, writer._driver]
        was_held = False
        assert peer.hold(0, 0)
        peer.signal(arrival, 1)
        peer.let_go(0, 0)
        for action in schedule:
            match action:
                case 0 | 1:
                    owner.poll()
                case _:
                    driver = drivers[action % 2]
                    assert isinstance(driver, HostDriver)
                    driver.step_any()
            if owner.is_held(0, 0):
                was_held = True
            elif was_held and owner.load(arrival) == 0:
                return "the holder is gone, and it has counted nothing"
    return None


def _two_mirrors_with_a_writer_in_between() -> Iterator[list[int]]:
    """The owner takes two mirrors; the writer's two stores come anywhere."""
    mirror = [0, *[2] * 7]
    for second in range(2 * len(mirror) + 1):
        for first in range(second + 1):
            schedule = [*mirror, *mirror, 0]
            schedule.insert(second, 3)
            schedule.insert(first, 3)
            yield schedule


def test_who_sees_a_lane_free_sees_what_its_holder_wrote() -> None:
    for schedule in _two_mirrors_with_a_writer_in_between():
        assert play_lanes(schedule, NvshmemHeap) is None


def test_holders_that_are_newer_than_their_words_are_noticed() -> None:
    assert any(
        play_lanes(schedule, LooksAtHoldersLast) for schedule in _two_mirrors_with_a_writer_in_between()
    )


def test_random_bytes_at_random_places() -> None:
    world = HostWorld(num_ranks=2)
    with (
        make_heap(world, 1, driver=HostDriver(threaded=True)) as owner,
        make_heap(world, 2, driver=HostDriver(threaded=True)) as sender,
        ThreadPoolExecutor(1) as executor,
        sender.attach(owner.address) as peer,
    ):
        sent = executor.submit(send_random, sender, peer, 200)

        assert receive_random(owner, sender.layout, 200) == 0
        sent.result(timeout=30)
        owner.poll(wait=True)
        assert not owner.is_held(0, 0)
