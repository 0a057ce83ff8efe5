"""What every heap must do, within one process. heap_process_conformance.py goes on with several."""

from __future__ import annotations

import random
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microserve.kvcache.heap.heap import Copies, Copy, Heap, PeerHeap
from microserve.protocol.errors import InternalError, TransferFailed
from microserve.protocol.messages.kv.grant import MAX_LANES
from tests.support.kvcache.heap.heap_child import wait_until
from tests.support.kvcache.heap.heap_factories import MINE, NUM_SLOTS, OTHERS, THEIRS, HeapFactory
from tests.support.kvcache.kv_samples import POISON_BYTE, data_of, make_layout, set_data, settle


class HeapConformance:
    @pytest.fixture
    def mine(self, factory: HeapFactory) -> Iterator[Heap]:
        """The writer's heap; its pool is smaller than the peer's."""
        with factory.create(make_layout(num_blocks=5), MINE) as heap:
            yield heap

    @pytest.fixture
    def theirs(self, factory: HeapFactory) -> Iterator[Heap]:
        with factory.create(make_layout(num_blocks=8), THEIRS) as heap:
            yield heap

    @pytest.fixture
    def peer(self, mine: Heap, theirs: Heap) -> Iterator[PeerHeap]:
        with mine.attach(theirs.address) as peer:
            yield peer

    # --- bytes

    def test_a_new_heap_is_zero_and_writable(self, theirs: Heap) -> None:
        assert data_of(theirs).shape == (theirs.layout.data_nbytes,)
        assert not data_of(theirs).any()
        assert all(theirs.load(word) == 0 for word in range(theirs.words.num_words))

        set_data(theirs, 7)

        assert (data_of(theirs) == 7).all()

    def test_the_peer_is_seen_with_its_own_layout(self, theirs: Heap, peer: PeerHeap) -> None:
        assert peer.layout == theirs.layout
        assert peer.words == theirs.words
        assert peer.address == theirs.address

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
    @given(data=st.data())
    def test_put_writes_exactly_what_it_names(
        self, mine: Heap, theirs: Heap, peer: PeerHeap, data: st.DataObject
    ) -> None:
        source_shift = data.draw(st.integers(0, 64))
        target_shift = data.draw(st.integers(0, 64))
        seed = data.draw(st.integers(0, 9))
        mine_nbytes, theirs_nbytes = mine.layout.data_nbytes, theirs.layout.data_nbytes
        content = random.Random(seed).randbytes(mine_nbytes)
        set_data(mine, content)
        set_data(theirs, POISON_BYTE)
        expected = bytearray([POISON_BYTE]) * theirs_nbytes
        copies = []
        # Targets in disjoint strips; sources anywhere.
        for strip in range(0, theirs_nbytes - 64 - 32, 32):
            if data.draw(st.booleans()):
                nbytes = data.draw(st.integers(0, 32))
                source = data.draw(st.integers(0, mine_nbytes - 64 - nbytes))
                copies.append(Copy(source, strip, nbytes))
                start = source + source_shift
                expected[strip + target_shift : strip + target_shift + nbytes] = content[
                    start : start + nbytes
                ]

        peer.put(Copies(copies), source_shift, target_shift)
        settle(peer, theirs)

        assert data_of(theirs).tobytes() == expected

    @pytest.mark.parametrize(
        ("source", "target", "nbytes", "source_shift", "target_shift"),
        [
            (0, -1, 8, 0, 1),
            (-8, 0, 8, 8, 0),
            (0, 0, 8, -1, 0),
            (0, 0, 8, 0, -1),
            (0, "end", 1, 0, 0),
            ("end", 0, 1, 0, 0),
            (0, 0, 8, 0, "end"),
            (0, 0, 8, "end", 0),
        ],
    )
    def test_put_outside_either_region_is_refused_and_writes_nothing(
        self,
        mine: Heap,
        theirs: Heap,
        peer: PeerHeap,
        source: int | str,
        target: int | str,
        nbytes: int,
        source_shift: int | str,
        target_shift: int | str,
    ) -> None:
        ends = {"source": mine.layout.data_nbytes, "target": theirs.layout.data_nbytes}
        values = {"source": source, "target": target}
        shifts = {"source": source_shift, "target": target_shift}
        at = {side: ends[side] if value == "end" else value for side, value in values.items()}
        by = {side: ends[side] - 4 if value == "end" else value for side, value in shifts.items()}
        set_data(theirs, POISON_BYTE)

        with pytest.raises(InternalError):
            peer.put(
                Copies([Copy(64, 128, 8), Copy(at["source"], at["target"], nbytes)]),  # type: ignore[arg-type]
                by["source"],  # type: ignore[arg-type]
                by["target"],  # type: ignore[arg-type]
            )

        settle(peer, theirs)
        assert (data_of(theirs) == POISON_BYTE).all()

    # --- words

    def test_words_carry_64_bits_both_ways(self, theirs: Heap, peer: PeerHeap) -> None:
        for word, value in ((0, (1 << 64) - 1), (theirs.words.num_words - 1, 1 << 63), (5, 1)):
            peer.signal(word, value)
            settle(peer, theirs)
            assert theirs.load(word) == value
            theirs.store(word, value - 1)
            theirs.poll(wait=True)
            assert theirs.load(word) == peer.read(word) == value - 1

    def test_several_words_at_once(self, theirs: Heap, peer: PeerHeap) -> None:
        words = theirs.words.tags(1, [6, 0, 3])

        peer.signal_each(words, 77)
        settle(peer, theirs)

        assert theirs.load_each(words).tolist() == [77, 77, 77]
        assert sum(theirs.load(word) == 77 for word in range(theirs.words.num_words)) == 3

    def test_data_and_words_do_not_overlap(self, theirs: Heap, peer: PeerHeap) -> None:
        set_data(theirs, 255)
        theirs.poll(wait=True)
        assert all(theirs.load(word) == 0 for word in range(theirs.words.num_words))

        for word in range(theirs.words.num_words):
            peer.signal(word, 0)
        settle(peer, theirs)

        assert (data_of(theirs) == 255).all()

    # --- attaching

    def test_attach_refuses_another_layout(self, factory: HeapFactory, mine: Heap) -> None:
        with (
            factory.create(make_layout(model="other"), OTHERS) as other,
            pytest.raises(TransferFailed, match="laid out"),
        ):
            mine.attach(other.address)

    @pytest.mark.parametrize("change", [{"kind": "carrier pigeon"}, {"host": "elsewhere"}])
    def test_attach_refuses_what_is_out_of_reach(
        self, mine: Heap, theirs: Heap, change: dict[str, str]
    ) -> None:
        with pytest.raises(TransferFailed, match="out of reach"):
            mine.attach(msgspec.structs.replace(theirs.address, **change))

    def test_attach_refuses_another_incarnation(self, mine: Heap, theirs: Heap) -> None:
        with pytest.raises(TransferFailed):
            mine.attach(msgspec.structs.replace(theirs.address, incarnation=OTHERS))

    def test_attach_refuses_a_heap_that_is_gone(self, mine: Heap, theirs: Heap) -> None:
        theirs.close()

        with pytest.raises(TransferFailed, match="gone"):
            mine.attach(theirs.address)

    def test_an_engine_may_attach_itself(self, mine: Heap) -> None:
        set_data(mine, bytes([9]) * 8 + bytes([1]) * (mine.layout.data_nbytes - 8))
        with mine.attach(mine.address) as peer:
            peer.put(Copies([Copy(0, 100, 8)]))

            assert peer.hold(0, 0)
            settle(peer, mine)
            assert mine.is_held(0, 0)
            peer.let_go(0, 0)

        assert (data_of(mine) == 9).sum() == 16

    # --- life

    def test_a_living_owner_is_not_dead(self, factory: HeapFactory, theirs: Heap, peer: PeerHeap) -> None:
        assert not peer.owner_is_dead()

        theirs.close()

        if factory.is_remote:
            wait_until(peer.owner_is_dead, "the end of the connection")
        assert peer.owner_is_dead()

    def test_writing_to_a_dead_owner_harms_nobody(
        self, factory: HeapFactory, theirs: Heap, peer: PeerHeap
    ) -> None:
        theirs.close()

        if factory.is_remote:
            wait_until(lambda: peer.is_lost, "the end of the connection")
            for call in (lambda: peer.put(Copies([Copy(0, 0, 64)])), lambda: peer.hold(0, 0)):
                with pytest.raises(TransferFailed, match="lost"):
                    call()
        else:
            peer.put(Copies([Copy(0, 0, 64)]))
        peer.signal(0, 1)
        peer.poll(wait=True)

        if factory.is_remote:
            with pytest.raises(TransferFailed, match="lost"):
                peer.read(0)
        else:
            assert peer.read(0) == 1

    def test_a_closed_peer_refuses_everything(self, mine: Heap, theirs: Heap) -> None:
        peer = mine.attach(theirs.address)
        peer.close()
        peer.close()

        for call in (
            lambda: peer.put(Copies([Copy(0, 0, 8)])),
            lambda: peer.signal(0, 1),
            lambda: peer.signal_each(np.array([0]), 1),
            lambda: peer.read(0),
            lambda: peer.hold(0, 0),
            lambda: peer.let_go(0, 0),
            lambda: peer.follow(0),
            peer.poll,
            peer.owner_is_dead,
        ):
            with pytest.raises(InternalError):
                call()
        theirs.poll(wait=True)
        assert theirs.load(0) == 0
        assert not theirs.is_held(0, 0)

    def test_heaps_close_twice(self, factory: HeapFactory) -> None:
        heap = factory.create(make_layout(), OTHERS)
        heap.close()
        heap.close()

    # --- lanes

    def test_one_writer_holds_a_lane_at_a_time(
        self, factory: HeapFactory, theirs: Heap, peer: PeerHeap
    ) -> None:
        with (
            factory.create(make_layout(), OTHERS) as other,
            other.attach(theirs.address) as rival,
        ):
            settle(peer, theirs)
            assert not theirs.is_held(1, 2)
            assert peer.hold(1, 2)
            settle(peer, theirs)
            assert theirs.is_held(1, 2)
            assert not peer.hold(1, 2)
            assert not rival.hold(1, 2)
            rival.let_go(1, 2)
            settle(rival, theirs)
            assert theirs.is_held(1, 2)

            peer.let_go(1, 2)
            peer.let_go(1, 2)
            settle(peer, theirs)

            assert not theirs.is_held(1, 2)
            assert rival.hold(1, 2)
            assert not peer.hold(1, 2)
            rival.let_go(1, 2)

    def test_lanes_are_independent(self, theirs: Heap, peer: PeerHeap) -> None:
        lanes = [(slot, lane) for slot in range(NUM_SLOTS) for lane in range(MAX_LANES)]
        held = set()
        for key in random.Random(1).sample(lanes, len(lanes)):
            assert peer.hold(*key)
            held.add(key)
            assert {key for key in lanes if peer.holds(*key)} == held
            settle(peer, theirs)
            assert {key for key in lanes if theirs.is_held(*key)} == held
        for key in random.Random(2).sample(lanes, len(lanes)):
            peer.let_go(*key)
            held.remove(key)
            settle(peer, theirs)
            assert {key for key in lanes if peer.holds(*key)} == held
            assert {key for key in lanes if theirs.is_held(*key)} == held

    def test_a_peer_with_a_held_lane_cannot_close(self, theirs: Heap, peer: PeerHeap) -> None:
        assert peer.is_idle
        peer.hold(0, 1)
        assert not peer.is_idle

        with pytest.raises(InternalError, match=r"\(0, 1\)"):
            peer.close()

        settle(peer, theirs)
        assert theirs.is_held(0, 1)
        peer.let_go(0, 1)
        peer.poll(wait=True)
        assert peer.is_idle

    def test_another_heap_s_lanes_are_not_this_one_s(
        self, factory: HeapFactory, mine: Heap, peer: PeerHeap
    ) -> None:
        with factory.create(make_layout(), OTHERS) as other, mine.attach(other.address) as elsewhere:
            assert elsewhere.hold(0, 0)
            assert peer.hold(0, 0)
            peer.let_go(0, 0)
            settle(elsewhere, other)
            assert other.is_held(0, 0)
            elsewhere.let_go(0, 0)
