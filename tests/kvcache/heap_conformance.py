"""What every heap must do. A new heap adds a factory to ``FACTORIES`` and passes.

``HeapConformance`` runs in one process; ``HeapProcessConformance`` is for heaps that other processes can
attach, which heap_process.py plays.
"""

from __future__ import annotations

import json
import os
import random
import selectors
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microserve.kvcache.heap.heap import Copies, Copy, Heap, PeerHeap
from microserve.kvcache.heap.memory import MemoryHeap, MemoryRegistry
from microserve.kvcache.heap.shm import ShmHeap
from microserve.kvcache.layout import KvLayout
from microserve.kvcache.words import MAX_LANES
from microserve.protocol.errors import InternalError, TransferFailed
from microserve.protocol.grant import HeapAddress
from tests.kvcache.kv_samples import POISON_BYTE, make_layout

TIMEOUT_S = 30.0
NUM_SLOTS = 3
MINE, THEIRS, OTHERS = 11, 22, 33
"""Incarnations."""


class HeapFactory(ABC):
    crosses_processes: ClassVar[bool]

    @abstractmethod
    def create(self, layout: KvLayout, incarnation: int) -> Heap: ...


class MemoryFactory(HeapFactory):
    crosses_processes = False

    def __init__(self) -> None:
        self.registry = MemoryRegistry()

    def create(self, layout: KvLayout, incarnation: int) -> Heap:
        return MemoryHeap(layout, incarnation=incarnation, registry=self.registry, num_slots=NUM_SLOTS)


class ShmFactory(HeapFactory):
    crosses_processes = True

    def create(self, layout: KvLayout, incarnation: int) -> Heap:
        return ShmHeap(layout, incarnation=incarnation, num_slots=NUM_SLOTS)


FACTORIES: dict[str, Callable[[], HeapFactory]] = {"memory": MemoryFactory, "shm": ShmFactory}
CROSSING = [name for name, factory in FACTORIES.items() if factory().crosses_processes]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        os.sched_yield()


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
        assert theirs.data.shape == (theirs.layout.data_nbytes,)
        assert not theirs.data.any()
        assert all(theirs.load(word) == 0 for word in range(theirs.words.num_words))

        theirs.data[:] = 7

        assert theirs.data.all()

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
        mine.data[:] = np.frombuffer(random.Random(seed).randbytes(mine.data.size), np.uint8)
        theirs.data[:] = POISON_BYTE
        expected = bytearray(theirs.data)
        copies = []
        # Targets in disjoint strips; sources anywhere.
        for strip in range(0, theirs.data.size - 64 - 32, 32):
            if data.draw(st.booleans()):
                nbytes = data.draw(st.integers(0, 32))
                source = data.draw(st.integers(0, mine.data.size - 64 - nbytes))
                copies.append(Copy(source, strip, nbytes))
                start = source + source_shift
                expected[strip + target_shift : strip + target_shift + nbytes] = mine.data[
                    start : start + nbytes
                ].tobytes()

        peer.put(Copies(copies), source_shift, target_shift)

        assert theirs.data.tobytes() == expected

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
        ends = {"source": mine.data.size, "target": theirs.data.size}
        values = {"source": source, "target": target}
        shifts = {"source": source_shift, "target": target_shift}
        at = {side: ends[side] if value == "end" else value for side, value in values.items()}
        by = {side: ends[side] - 4 if value == "end" else value for side, value in shifts.items()}
        theirs.data[:] = POISON_BYTE

        with pytest.raises(InternalError):
            peer.put(
                Copies([Copy(64, 128, 8), Copy(at["source"], at["target"], nbytes)]),  # type: ignore[arg-type]
                by["source"],  # type: ignore[arg-type]
                by["target"],  # type: ignore[arg-type]
            )

        assert (theirs.data == POISON_BYTE).all()

    def test_views_of_the_data_outlive_the_heap(self, factory: HeapFactory) -> None:
        heap = factory.create(make_layout(), OTHERS)
        view = heap.data
        view[:] = 5
        heap.close()

        assert view[-1] == 5
        view[0] = 6

    # --- words

    def test_words_carry_64_bits_both_ways(self, theirs: Heap, peer: PeerHeap) -> None:
        for word, value in ((0, (1 << 64) - 1), (theirs.words.num_words - 1, 1 << 63), (5, 1)):
            peer.signal(word, value)
            assert theirs.load(word) == value
            theirs.store(word, value - 1)
            assert peer.read(word) == value - 1

    def test_several_words_at_once(self, theirs: Heap, peer: PeerHeap) -> None:
        words = theirs.words.tags(1, [6, 0, 3])

        peer.signal_each(words, 77)

        assert theirs.load_each(words).tolist() == [77, 77, 77]
        assert sum(theirs.load(word) == 77 for word in range(theirs.words.num_words)) == 3

    def test_data_and_words_do_not_overlap(self, theirs: Heap, peer: PeerHeap) -> None:
        theirs.data[:] = 255
        assert all(theirs.load(word) == 0 for word in range(theirs.words.num_words))

        for word in range(theirs.words.num_words):
            peer.signal(word, 0)

        assert (theirs.data == 255).all()

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
        mine.data[:] = 1
        mine.data[:8] = 9
        with mine.attach(mine.address) as peer:
            peer.put(Copies([Copy(0, 100, 8)]))

            assert peer.hold(0, 0)
            assert mine.is_held(0, 0)
            peer.let_go(0, 0)

        assert (mine.data == 9).sum() == 16

    # --- life

    def test_a_living_owner_is_not_dead(self, theirs: Heap, peer: PeerHeap) -> None:
        assert not peer.owner_is_dead()

        theirs.close()

        assert peer.owner_is_dead()

    def test_writing_to_a_dead_owner_harms_nobody(self, mine: Heap, theirs: Heap, peer: PeerHeap) -> None:
        theirs.close()

        peer.put(Copies([Copy(0, 0, 64)]))
        peer.signal(0, 1)

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
            peer.owner_is_dead,
        ):
            with pytest.raises(InternalError):
                call()
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
            assert not theirs.is_held(1, 2)
            assert peer.hold(1, 2)
            assert theirs.is_held(1, 2)
            assert not peer.hold(1, 2)
            assert not rival.hold(1, 2)
            rival.let_go(1, 2)
            assert theirs.is_held(1, 2)

            peer.let_go(1, 2)
            peer.let_go(1, 2)

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
            assert {key for key in lanes if theirs.is_held(*key)} == held
        for key in random.Random(2).sample(lanes, len(lanes)):
            peer.let_go(*key)
            held.remove(key)
            assert {key for key in lanes if theirs.is_held(*key)} == held

    def test_a_peer_with_a_held_lane_cannot_close(self, theirs: Heap, peer: PeerHeap) -> None:
        peer.hold(0, 1)

        with pytest.raises(InternalError, match=r"\(0, 1\)"):
            peer.close()

        assert theirs.is_held(0, 1)
        peer.let_go(0, 1)

    def test_another_heap_s_lanes_are_not_this_one_s(
        self, factory: HeapFactory, mine: Heap, peer: PeerHeap
    ) -> None:
        with factory.create(make_layout(), OTHERS) as other, mine.attach(other.address) as elsewhere:
            assert elsewhere.hold(0, 0)
            assert peer.hold(0, 0)
            peer.let_go(0, 0)
            assert other.is_held(0, 0)
            elsewhere.let_go(0, 0)


class Child:
    """A process with a heap of its own, that does what it is told over its pipes."""

    def __init__(self, factory: str, incarnation: int, num_blocks: int = 8) -> None:
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.kvcache.heap_process"),
                *(factory, str(incarnation), str(num_blocks)),
            ],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.pid = self._process.pid
        self.address = msgspec.convert(self.receive(), HeapAddress)

    def send(self, do: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode({"do": do, **arguments}) + b"\n")
        self._process.stdin.flush()

    def receive(self, timeout_s: float = TIMEOUT_S) -> Any:
        assert self._process.stdout is not None
        # One answer for one question, so no second line hides in the buffered reader.
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                raise TimeoutError(f"child {self.pid} does not answer")
        return json.loads(self._process.stdout.readline())

    def ask(self, do: str, **arguments: Any) -> Any:
        self.send(do, **arguments)
        return self.receive()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def stop(self) -> None:
        """SIGSTOP, and wait until the kernel has stopped it."""
        self.signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def kill(self) -> None:
        """SIGKILL, and reap it."""
        self._process.kill()
        self._process.wait(TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


class HeapProcessConformance:
    @pytest.fixture
    def mine(self, factory_name: str) -> Iterator[Heap]:
        with FACTORIES[factory_name]().create(make_layout(), MINE) as heap:
            yield heap

    @pytest.fixture
    def child(self, factory_name: str) -> Iterator[Child]:
        with Child(factory_name, THEIRS) as child:
            yield child

    # The last is beyond what memcpy sends through the caches.
    @pytest.mark.parametrize(("nbytes", "num_rounds"), [(1 << 12, 3000), (1 << 20, 500), (1 << 26, 8)])
    def test_no_signal_overtakes_its_put(self, factory_name: str, nbytes: int, num_rounds: int) -> None:
        """The child paints our whole heap with one value a round and signals; we compare every byte."""
        num_blocks = nbytes // 128
        with (
            FACTORIES[factory_name]().create(make_layout(num_blocks=num_blocks), MINE) as mine,
            Child(factory_name, THEIRS, num_blocks) as child,
        ):
            assert 2 * 64 * num_blocks == mine.layout.data_nbytes == nbytes
            done, seen = mine.words.begin(0, 0), mine.words.begin(1, 0)
            child.ask("attach", address=mine.address)
            child.send("paint_and_signal", rounds=num_rounds, done=done, seen=seen)
            torn = 0
            for number in range(1, num_rounds + 1):
                wait_until(lambda number=number: mine.load(done) >= number, f"round {number}")  # type: ignore[misc]
                torn += int((mine.data != number % 251).sum())
                mine.store(seen, number)

            assert torn == 0
            assert child.receive() == "done"

    def test_a_claim_and_a_close_never_miss_each_other(self, mine: Heap, child: Child) -> None:
        """The owner closes and asks who holds; the writer holds and asks if it is closed; at one moment.

        A writer that found it open must have been seen, or its blocks would be given away under it.
        """
        num_rounds = 4000
        words = {"state": mine.words.state(0), "go": mine.words.begin(0, 0), "result": mine.words.end(0, 0)}
        chance = random.Random(5)
        outcomes = set()
        child.ask("attach", address=mine.address)
        child.send("claim_against_close", rounds=num_rounds, **words)
        for number in range(1, num_rounds + 1):
            mine.store(words["go"], number)
            for _ in range(chance.randrange(200)):
                pass
            mine.store(words["state"], number)
            is_held = mine.is_held(0, 0)
            wait_until(lambda number=number: mine.load(words["result"]) >= 2 * number, f"round {number}")  # type: ignore[misc]
            found_open = bool(mine.load(words["result"]) & 1)
            outcomes.add((found_open, is_held))

        assert (True, False) not in outcomes
        assert (True, True) in outcomes
        assert child.receive() == "done"

    def test_a_writer_killed_in_the_middle_of_its_puts_is_proven_dead(self, mine: Heap, child: Child) -> None:
        child.ask("attach", address=mine.address)
        assert child.ask("hold", slot=1, lane=1)
        child.send("put_for_ever", word=mine.words.begin(0, 0))
        wait_until(lambda: mine.load(mine.words.begin(0, 0)) > 100, "puts")
        assert mine.is_held(1, 1)

        child.stop()
        assert mine.is_held(1, 1)
        child.signal(signal.SIGCONT)
        assert mine.is_held(1, 1)
        child.signal(signal.SIGKILL)
        # Not reaped: a zombie has no threads and no mappings, and its lane is free.
        wait_until(lambda: not mine.is_held(1, 1), "the lane of a dead writer")

        mine.data[:] = POISON_BYTE
        child.kill()
        assert (mine.data == POISON_BYTE).all()

    def test_an_owner_is_dead_only_when_it_is(self, mine: Heap, child: Child) -> None:
        peer = mine.attach(child.address)
        assert not peer.owner_is_dead()

        child.stop()
        assert not peer.owner_is_dead()
        mine.attach(child.address).close()

        child.kill()
        wait_until(peer.owner_is_dead, "the owner's death")
        with pytest.raises(TransferFailed, match="gone"):
            mine.attach(child.address)
        peer.put(Copies([Copy(0, 0, 64)]))
        peer.signal(0, 1)
        peer.close()

    def test_a_writer_that_leaves_frees_its_lanes(self, mine: Heap, child: Child) -> None:
        child.ask("attach", address=mine.address)
        assert child.ask("hold", slot=0, lane=0)
        assert not child.ask("hold", slot=0, lane=0)
        assert mine.is_held(0, 0)

        child.ask("let_go", slot=0, lane=0)

        assert not mine.is_held(0, 0)

    def test_another_process_under_the_owner_s_id_is_not_the_owner(self, mine: Heap, child: Child) -> None:
        impostor = msgspec.structs.replace(child.address, incarnation=OTHERS)
        with pytest.raises(TransferFailed):
            mine.attach(impostor)
        for fd in range(3):
            with pytest.raises(TransferFailed):
                mine.attach(msgspec.structs.replace(child.address, fd=fd))
        with pytest.raises(TransferFailed):
            mine.attach(msgspec.structs.replace(child.address, pid=os.getpid()))

    def test_nothing_is_left_behind(self, factory_name: str) -> None:
        """After a kill on either side: no file in /dev/shm, no descriptor and no mapping here."""
        before = _traces()
        with (
            Child(factory_name, THEIRS) as child,
            FACTORIES[factory_name]().create(make_layout(), 44) as heap,
        ):
            child.ask("attach", address=heap.address)
            with heap.attach(child.address) as peer:
                assert _traces() != before
                child.kill()
                assert peer.owner_is_dead()

        assert _traces() == before


def _traces() -> tuple[set[str], set[str], int]:
    links = set()
    for fd in os.listdir("/proc/self/fd"):
        # The listing has a descriptor of its own.
        if os.path.lexists(path := f"/proc/self/fd/{fd}"):
            links.add(f"{fd} {os.readlink(path)}")
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    return set(os.listdir("/dev/shm")), links, maps.count("microserve")
