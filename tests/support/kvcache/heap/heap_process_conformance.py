"""What every heap that other processes can attach must do: order, races, and proof of death."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from microserve.kvcache.heap.heap import Copies, Copy, Heap
from microserve.kvcache.heap.memfd import HEAP_NAME
from microserve.protocol.errors import TransferFailed
from tests.support.kvcache.heap.heap_child import Child, wait_until
from tests.support.kvcache.heap.heap_factories import FACTORIES, MINE, OTHERS, THEIRS
from tests.support.kvcache.heap.heap_stress import receive_random
from tests.support.kvcache.kv_samples import POISON_BYTE, data_of, make_layout, set_data


class HeapProcessConformance:
    num_random_rounds = 300

    @pytest.fixture
    def mine(self, factory_name: str) -> Iterator[Heap]:
        with FACTORIES[factory_name]().create(make_layout(), MINE) as heap:
            yield heap

    @pytest.fixture
    def child(self, factory_name: str) -> Iterator[Child]:
        with Child(factory_name, THEIRS) as child:
            yield child

    # The last is beyond what memcpy sends through the caches.
    @pytest.mark.parametrize(
        ("nbytes", "num_rounds"),
        [
            pytest.param(1 << 12, 3000, marks=pytest.mark.heavy),
            pytest.param(1 << 20, 500, marks=pytest.mark.heavy),
            (1 << 26, 8),
        ],
    )
    def test_no_signal_overtakes_its_put(self, factory_name: str, nbytes: int, num_rounds: int) -> None:
        """The child paints our whole heap with one value a round and signals; we compare every byte."""
        num_blocks = nbytes // 128
        with (
            FACTORIES[factory_name]().create(make_layout(num_blocks=num_blocks), MINE) as mine,
            Child(factory_name, THEIRS, num_blocks) as child,
        ):
            assert mine.layout.data_nbytes == nbytes
            done, seen = mine.words.begin(0, 0), mine.words.begin(1, 0)
            child.ask("attach", address=mine.address)
            child.send("paint_and_signal", rounds=num_rounds, done=done, seen=seen)
            torn = 0
            for number in range(1, num_rounds + 1):
                wait_until(lambda number=number: mine.load(done) >= number, f"round {number}")  # type: ignore[misc]
                torn += int((mine.read_data(0, nbytes) != number % 251).sum())
                mine.store(seen, number)

            assert torn == 0
            assert child.receive() == "done"

    def test_random_bytes_at_random_places(self, mine: Heap, child: Child) -> None:
        child.ask("attach", address=mine.address)
        child.send("send_random", rounds=self.num_random_rounds)

        assert receive_random(mine, make_layout(), self.num_random_rounds) == 0
        assert child.receive() == "done"

    def test_a_claim_and_a_close_never_miss_each_other(
        self, factory_name: str, mine: Heap, child: Child
    ) -> None:
        """The owner closes and asks who holds; the writer holds and asks if it is closed; at one moment.

        A writer that found it open must have been seen, or its blocks would be given away under it.
        """
        num_rounds = FACTORIES[factory_name]().num_race_rounds
        words = {"state": mine.words.state(0), "go": mine.words.begin(0, 0), "result": mine.words.end(0, 0)}
        chance = random.Random(5)
        outcomes = set()
        child.ask("attach", address=mine.address)
        child.send("claim_against_close", rounds=num_rounds, **words)
        for number in range(1, num_rounds + 1):
            mine.store(words["go"], number)
            if number % 100 == 0:  # now and then surely after the writer, however the processes are scheduled
                wait_until(lambda number=number: mine.load(words["result"]) >= 2 * number, f"round {number}")  # type: ignore[misc]
            for _ in range(int(10 ** chance.uniform(0.0, 3.5))):
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

        set_data(mine, POISON_BYTE)
        child.kill()
        assert (data_of(mine) == POISON_BYTE).all()

    def test_an_owner_is_dead_only_when_it_is(self, factory_name: str, mine: Heap, child: Child) -> None:
        is_remote = FACTORIES[factory_name]().is_remote
        peer = mine.attach(child.address)
        assert not peer.owner_is_dead()

        child.stop()
        assert not peer.owner_is_dead()
        if is_remote:
            # Whom we asked does not answer while it is frozen, and may be asked all the same.
            child.signal(signal.SIGCONT)
        mine.attach(child.address).close()

        child.kill()
        wait_until(peer.owner_is_dead, "the owner's death")
        with pytest.raises(TransferFailed, match="gone"):
            mine.attach(child.address)
        if is_remote:
            assert peer.is_lost
        else:
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
        before = self.traces()
        with (
            Child(factory_name, THEIRS) as child,
            FACTORIES[factory_name]().create(make_layout(), 44) as heap,
        ):
            child.ask("attach", address=heap.address)
            with heap.attach(child.address) as peer:
                assert self.traces() != before
                child.kill()
                if FACTORIES[factory_name]().is_remote:
                    wait_until(peer.owner_is_dead, "the owner's death")
                assert peer.owner_is_dead()

        assert self.traces() == before

    def traces(self) -> tuple[set[str], set[str], int]:
        """Of heaps alone: other programs of the machine come and go in /dev/shm, and a library of ours that
        this process loads at its first put it keeps."""
        links = set()
        for fd in os.listdir("/proc/self/fd"):
            # The listing has a descriptor of its own.
            if os.path.lexists(path := f"/proc/self/fd/{fd}"):
                links.add(f"{fd} {os.readlink(path)}")
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        shared = {name for name in os.listdir("/dev/shm") if "microserve" in name}
        return shared, links, maps.count(HEAP_NAME)
