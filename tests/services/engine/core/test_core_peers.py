"""Heaps of other engines: what is opened, that nothing is begun towards an owner that is dead, and what is
known of the networks between."""

from __future__ import annotations

import msgspec
import pytest

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.grant.table import GrantTable
from microserve.kvcache.heap.local import MemoryHeap, MemoryRegistry
from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import TransferFailed
from microserve.services.engine.core.peers import Peers

LAYOUT = KvLayout("m", 2, 8, 4, 1, 4, "float32", "r")
WRITER, OWNER = 7, 9


@pytest.mark.parametrize("is_writing", [False, True])
def test_no_send_begins_to_an_owner_that_has_died(is_writing: bool) -> None:
    """Whether or not another one, begun before, still holds a lane there."""
    registry = MemoryRegistry()
    mine, owner = (MemoryHeap(LAYOUT, incarnation=each, registry=registry) for each in (WRITER, OWNER))
    pool = BlockPool(LAYOUT.num_blocks)
    table = GrantTable(owner, pool, engine_id="e", incarnation=OWNER, lease_s=5.0, verify_checksums=True)
    grants = [table.open(name, "router", [], 0, pool.allocate(1), 4, 0.0) for name in ("first", "second")]
    peers = Peers(mine, lambda: 0.0)
    peer = peers.open(grants[0])
    assert peers.open(grants[1]) is peer
    if is_writing:
        assert peer.hold(grants[0].slot, 0)
    registry.kill(OWNER)
    for _ in range(2):
        with pytest.raises(TransferFailed, match="gone"):
            peers.open(grants[1])
    if is_writing:
        assert peer.holds(grants[0].slot, 0), "it is that send's to let go"
        peer.let_go(grants[0].slot, 0)
    peers.close()


def test_what_is_known_of_a_network_outlives_its_connection_and_not_the_engine() -> None:
    registry = MemoryRegistry()
    mine, owner = (MemoryHeap(LAYOUT, incarnation=each, registry=registry) for each in (WRITER, OWNER))
    pool = BlockPool(LAYOUT.num_blocks)
    table = GrantTable(owner, pool, engine_id="e", incarnation=OWNER, lease_s=5.0, verify_checksums=True)
    grant = table.open("r", "router", [], 0, pool.allocate(1), 4, 0.0)
    peers = Peers(mine, lambda: 0.0)
    assert peers.nbytes_per_s(grant) == 0.0
    samples = [(1 << 20, 0.5)]

    def take() -> list[tuple[int, float]]:
        taken = samples[:]
        samples.clear()
        return taken

    peers.open(grant).take_samples = take  # type: ignore[method-assign]
    assert peers.nbytes_per_s(grant) == 1 << 21
    assert peers.goodputs(8) == {"e": 1 << 21}
    peers._leave(OWNER)
    assert peers.goodputs(8) == {}  # nobody is told of who is not there
    peers.open(grant)
    assert peers.goodputs(8) == {"e": 1 << 21}
    other = msgspec.structs.replace(grant, heap=msgspec.structs.replace(grant.heap, incarnation=OWNER + 1))
    assert peers.nbytes_per_s(other) == 0.0
    peers.close()
