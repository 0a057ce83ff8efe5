"""Grants between real processes: writers are stopped, continued and killed while the receiver goes on."""

from __future__ import annotations

import itertools
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import msgspec
import pytest

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.grant.table import Discharged, GrantTable, Settled
from microserve.kvcache.heap.heap import Heap
from microserve.protocol.messages.kv.grant import Grant
from tests.support.kvcache.heap.heap_child import Child, wait_until
from tests.support.kvcache.heap.heap_factories import CROSSING, DOORS, FACTORIES
from tests.support.kvcache.kv_samples import is_painted, make_layout, mismatches, paint

pytestmark = pytest.mark.slow

NUM_BLOCKS = 64
RECEIVER = 1


class Receiver:
    def __init__(self, heap: Heap) -> None:
        self.heap = heap
        self.pool = BlockPool(NUM_BLOCKS)
        self.table = GrantTable(
            *(heap, self.pool), engine_id="e", incarnation=RECEIVER, lease_s=60.0, verify_checksums=True
        )

    def open(self, end: int) -> Grant:
        blocks = self.pool.allocate(self.heap.layout.num_blocks_for(end))
        return self.table.open("request", "router", [], 0, blocks, end, now=0.0)

    def wait_for_discharge(self) -> None:
        def poll() -> bool:
            self.table.poll(0.0)
            return self.pool.num_quarantined == 0

        wait_until(poll, "discharge")

    def receive(self, grant: Grant, seed: int) -> None:
        """What an engine does with a grant that completes, up to the end of its request."""
        table, grant_id = self.table, grant.grant_id
        wait_until(lambda: table.is_complete(grant_id) or table.poisoned(grant_id) is not None, grant_id)
        assert table.poisoned(grant_id) is None
        for layer in range(self.heap.layout.num_layers):
            table.verify(grant_id, layer)
        table.seal(grant_id)
        wait_until(lambda: table.is_settled(grant_id), grant_id)
        assert table.poll(0.0) == [Settled(grant_id, "request")]
        assert not mismatches(self.heap, grant.blocks, 0, 0, grant.end, seed)
        self.pool.free(grant.blocks)


@pytest.fixture(params=CROSSING)
def factory(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def receiver(factory: str) -> Iterator[Receiver]:
    with FACTORIES[factory]().create(make_layout(num_blocks=NUM_BLOCKS), RECEIVER) as heap:
        receiver = Receiver(heap)
        yield receiver
        receiver.table.check_integrity()
        receiver.pool.check_integrity()
        assert receiver.pool.num_free == NUM_BLOCKS


@pytest.fixture
def spawn(receiver: Receiver, factory: str) -> Iterator[Callable[[], Child]]:
    """Starts a sender, with blocks for 64 tokens and attached."""
    incarnations = itertools.count(100)
    with ExitStack() as stack:

        def spawn() -> Child:
            child = stack.enter_context(Child(factory, next(incarnations), 16))
            child.ask("attach", address=receiver.heap.address)
            return child

        yield spawn


def test_two_processes_fill_one_grant(receiver: Receiver, spawn: Callable[[], Child]) -> None:
    one, other = spawn(), spawn()
    for seed in range(20):
        grant = receiver.open(50)
        for child in (one, other):
            child.ask("fill", num_tokens=50, seed=seed)

        one.send("transfer", grant=msgspec.to_builtins(grant), lane=0, begin=0, end=21)
        other.send("transfer", grant=msgspec.to_builtins(grant), lane=1, begin=21, end=50)

        receiver.receive(grant, seed)
        assert (one.receive(), other.receive()) == ("finished", "finished")


def test_a_writer_killed_within_a_transfer(receiver: Receiver, spawn: Callable[[], Child]) -> None:
    child = spawn()
    grant = receiver.open(50)
    child.ask("fill", num_tokens=50, seed=1)
    child.ask("claim", grant=msgspec.to_builtins(grant), lane=2, begin=0, end=50)
    child.ask("put", lo=0, hi=30)
    assert receiver.table.frontier(grant.grant_id, 1) == 30
    assert receiver.table.poisoned(grant.grant_id) is None

    child.kill()

    wait_until(lambda: receiver.table.poisoned(grant.grant_id) is not None, "notice of the death")
    assert "lane 2" in str(receiver.table.poisoned(grant.grant_id))
    receiver.table.close(grant.grant_id, now=0.0)
    assert receiver.pool.num_quarantined == 0


@pytest.mark.parametrize("factory", DOORS)
def test_a_writer_cut_off_before_its_claim_has_come_is_missed(
    receiver: Receiver, spawn: Callable[[], Child]
) -> None:
    """It has the lane, so it may have put everything into its end of the connection, and be done."""
    child = spawn()
    grant, other = receiver.open(50), receiver.open(50)
    assert child.ask("hold", slot=grant.slot, lane=1)
    assert receiver.table.poisoned(grant.grant_id) is None

    child.kill()

    wait_until(lambda: receiver.table.poisoned(grant.grant_id) is not None, "notice of the death")
    assert receiver.table.poisoned(grant.grant_id) == "lane 1: its writer was cut off without a claim"
    assert receiver.table.poisoned(other.grant_id) is None
    for each in (grant, other):
        receiver.table.close(each.grant_id, now=0.0)
    assert receiver.pool.num_quarantined == 0
    for number in range(2 * receiver.heap.words.num_slots):  # and no later use of the slot hears of it
        later = receiver.open(4)
        assert receiver.table.poisoned(later.grant_id) is None, number
        receiver.table.close(later.grant_id, now=0.0)


def test_a_stopped_writer_keeps_its_blocks_in_quarantine(
    receiver: Receiver, spawn: Callable[[], Child]
) -> None:
    child = spawn()
    grant = receiver.open(50)
    child.ask("claim", grant=msgspec.to_builtins(grant), lane=0, begin=0, end=50)
    child.stop()
    receiver.table.close(grant.grant_id, now=0.0)

    assert receiver.table.poll(1e9) == []
    assert receiver.pool.num_quarantined == 13
    child.signal(signal.SIGCONT)
    child.ask("finish")

    assert receiver.table.poll(0.0) == [Discharged(grant.grant_id, "request", 13)]


def test_a_writer_killed_in_quarantine_gives_the_blocks_back(
    receiver: Receiver, spawn: Callable[[], Child]
) -> None:
    child = spawn()
    grant = receiver.open(50)
    child.ask("claim", grant=msgspec.to_builtins(grant), lane=0, begin=0, end=50)
    child.stop()
    receiver.table.close(grant.grant_id, now=0.0)
    assert receiver.table.poll(0.0) == []

    child.kill()

    receiver.wait_for_discharge()


@pytest.mark.heavy
def test_no_late_write_ever_lands_in_a_block_in_use(receiver: Receiver, spawn: Callable[[], Child]) -> None:
    """A grant is closed at any point of its transfer, and its writer perhaps stopped or killed. Every
    block that is free then is painted by another request, and must stay so whatever the writer does."""
    chance = random.Random(7)
    child = spawn()
    num_quarantined = 0
    for number in range(150):
        fate = chance.choices(("run", "stop", "kill"), (60, 38, 2))[0]
        grant = receiver.open(50)
        child.ask("fill", num_tokens=50, seed=number)
        child.send("transfer", grant=msgspec.to_builtins(grant), lane=0, begin=0, end=50)
        layer, progress = chance.randrange(2), chance.randrange(50)
        wait_until(lambda: receiver.table.frontier(grant.grant_id, layer) >= progress, "progress")  # noqa: B023
        if fate == "stop":
            child.stop()

        receiver.table.close(grant.grant_id, now=0.0)
        num_quarantined += receiver.pool.num_quarantined > 0
        others = receiver.pool.allocate(receiver.pool.num_free)
        paint(receiver.heap, others, number % 256)

        if fate == "kill":
            child.kill()
            child = spawn()
        else:
            child.signal(signal.SIGCONT)
            assert child.receive() in ("finished", "transfer_failed")
        receiver.wait_for_discharge()
        assert is_painted(receiver.heap, others, number % 256)
        receiver.pool.free(others)
    assert num_quarantined
