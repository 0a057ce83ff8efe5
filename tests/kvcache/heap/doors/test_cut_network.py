"""A writer on the other side of a network that is cut, without a word to either end; and healed.

Runs between two networks (tests/support/kvcache/networks.sh), by tests/hosts/test_doors_between_hosts.py.
"""

from __future__ import annotations

import os
import subprocess
from importlib.util import find_spec

import pytest

from microserve.kvcache.heap.doors.host import HostHeap, Opening
from tests.support.kvcache.heap.heap_child import Child, wait_until
from tests.support.kvcache.heap.heap_factories import DOOR_HOST, MINE, NUM_SLOTS, THEIRS, lose_patience
from tests.support.kvcache.kv_samples import POISON_BYTE, data_of, make_layout, set_data

OTHER = os.environ.get("MICROSERVE_TEST_OTHER", "")
pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not OTHER, reason="runs between two networks, by tests/hosts"),
]
KINDS = ["tcp", *(["nixl"] if find_spec("nixl") is not None else [])]
NUM_BLOCKS = 1 << 16


def lose(where: str, target: str) -> None:
    """What goes to ``target`` from there goes to a card that nobody has."""
    card = "heap-a" if where == "here" else "heap-b"
    command = ["ip", "neigh", "replace", target, "lladdr", "02:00:00:00:00:fe", "dev", card]
    command += ["nud", "permanent"]
    enter = [] if where == "here" else ["nsenter", "--target", OTHER, "--net"]
    subprocess.run([*enter, *command], check=True)


def heal() -> None:
    for enter, card in (([], "heap-a"), (["nsenter", "--target", OTHER, "--net"], "heap-b")):
        for more in (["nud", "permanent"], []):
            subprocess.run([*enter, "ip", "neigh", "flush", "dev", card, *more], check=True)


@pytest.mark.parametrize("ways", ["both", "to the writer", "to the owner"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_cut_off_changes_no_byte_when_it_is_heard_again(kind: str, ways: str) -> None:
    here, there = os.environ[DOOR_HOST], os.environ["MICROSERVE_TEST_OTHER_HOST"]
    heap = HostHeap(
        make_layout(num_blocks=NUM_BLOCKS),
        incarnation=MINE,
        num_slots=NUM_SLOTS,
        opening=Opening([kind], here, silence_s=60.0, shares_memory=False),
    )
    progress = heap.words.begin(0, 0)
    with heap, Child(kind, THEIRS, NUM_BLOCKS) as child:
        try:
            child.ask("attach", address=heap.address)
            assert child.ask("hold", slot=1, lane=1)
            child.send("paint_for_ever", word=progress)
            wait_until(lambda: heap.load(progress) > 2, "puts")
            if ways in ("both", "to the writer"):
                lose("here", there)
            if ways in ("both", "to the owner"):
                lose("there", here)
            assert heap.is_held(1, 1), "until it has been silent for long enough"

            lose_patience(heap)
            wait_until(lambda: not heap.is_held(1, 1), "the end of a writer that is cut off")
            words = [heap.load(word) for word in range(64)]
            set_data(heap, POISON_BYTE)
            heal()

            # It gives up by itself, heard or not; whatever it still had to say is lost.
            assert child.ended() != 0
            assert (data_of(heap) == POISON_BYTE).all()
            assert [heap.load(word) for word in range(64)] == words
        finally:
            heal()
    # The door is open to the next one.
    with heap_of(kind, here) as again, Child(kind, THEIRS) as child:
        child.ask("attach", address=again.address)
        assert child.ask("hold", slot=0, lane=0)
        child.ask("let_go", slot=0, lane=0)
        assert not again.is_held(0, 0)


def heap_of(kind: str, host: str) -> HostHeap:
    return HostHeap(
        make_layout(),
        incarnation=MINE,
        num_slots=NUM_SLOTS,
        opening=Opening([kind], host, shares_memory=False),
    )
