"""A door of NIXL keeps what its module says of late writes; the conformance suites hold the rest, where it is
installed (the extra ``nixl``)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest

from microserve.kvcache.heap.doors.host import HostHeap, Opening
from microserve.kvcache.heap.doors.nixl.agent import Agent
from microserve.protocol.errors import ConfigError
from tests.support.kvcache.heap.heap_child import Child, wait_until
from tests.support.kvcache.heap.heap_factories import MINE, NUM_SLOTS, OTHERS, THEIRS, lose_patience
from tests.support.kvcache.kv_samples import POISON_BYTE, data_of, make_layout, set_data

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(find_spec("nixl") is None, reason="needs the extra nixl"),
]


def make_heap(incarnation: int, *, num_blocks: int = 8) -> HostHeap:
    return HostHeap(
        make_layout(num_blocks=num_blocks),
        incarnation=incarnation,
        num_slots=NUM_SLOTS,
        opening=Opening(["nixl"], silence_s=60.0, shares_memory=False),
    )


@pytest.fixture
def large() -> Iterator[HostHeap]:
    """Of 32 MiB: puts of all of it take long enough to be met in the middle."""
    with make_heap(MINE, num_blocks=1 << 18) as heap:
        yield heap


@pytest.mark.parametrize("number", range(6))
def test_a_writer_frozen_in_the_middle_of_a_put_changes_no_byte_when_it_wakes(
    large: HostHeap, number: int
) -> None:
    heap = large
    progress = heap.words.begin(0, 0)
    with Child("nixl", THEIRS, 1 << 18) as child:
        child.ask("attach", address=heap.address)
        assert child.ask("hold", slot=1, lane=1)
        child.send("paint_for_ever", word=progress)
        wait_until(lambda: heap.load(progress) > 1 + number % 3, "puts")
        before = int(heap.read_data(heap.layout.data_nbytes - 1, 1)[0])
        wait_until(lambda: int(heap.read_data(0, 1)[0]) != before, "the beginning of a put")
        child.stop()
        assert heap.is_held(1, 1)

        lose_patience(heap)
        wait_until(lambda: not heap.is_held(1, 1), "the end of a silent writer")
        words = [heap.load(word) for word in range(64)]
        set_data(heap, POISON_BYTE)
        child.signal(signal.SIGCONT)

        assert child.ended() != 0
        assert (data_of(heap) == POISON_BYTE).all()
        assert [heap.load(word) for word in range(64)] == words


def test_an_agent_that_is_destroyed_leaves_no_descriptor_and_no_thread() -> None:
    def left() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    region = bytearray(1 << 16)
    at = np.frombuffer(region, np.uint8).ctypes.data
    Agent("first", at, len(region)).destroy()  # the library keeps what it takes once
    before = left()
    agents = [Agent(f"a{number}", at, len(region)) for number in range(3)]
    assert left() > before
    for agent in agents:
        agent.destroy()
    assert left() == before


def test_ways_that_no_tear_down_ends_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for said in ("all", "cma,tcp", "^tcp", "sm"):
        monkeypatch.setenv("UCX_TLS", said)
        with pytest.raises(ConfigError, match="UCX_TLS") as caught:
            make_heap(OTHERS)
        assert caught.value.field == "doors"
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    make_heap(OTHERS).close()
    assert os.environ["UCX_TLS"] == "tcp,self"
