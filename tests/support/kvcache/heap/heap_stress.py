"""Many transfers of random bytes to random places, every byte compared: order, and nothing beside its target.

The writer runs ``send_random``, the owner ``receive_random``; both draw a round's bytes from its number.
"""

from __future__ import annotations

import itertools
import os
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from microserve.kvcache.heap.heap import Copies, Copy, Heap, PeerHeap
from microserve.kvcache.layout import KvLayout
from tests.support.kvcache.heap.heap_child import wait_until
from tests.support.kvcache.kv_samples import POISON_BYTE, set_data


class _Round(NamedTuple):
    content: NDArray[np.uint8]
    source: int
    target: int

    @classmethod
    def draw(cls, number: int, source: KvLayout, target: KvLayout) -> _Round:
        chance = np.random.default_rng(number)
        room = min(source.data_nbytes, target.data_nbytes)
        content = np.frombuffer(chance.bytes(int(chance.integers(1, room + 1))), np.uint8)
        return cls(
            content,
            int(chance.integers(source.data_nbytes - content.size + 1)),
            int(chance.integers(target.data_nbytes - content.size + 1)),
        )


def cut(nbytes: int, num_runs: int) -> list[tuple[int, int]]:
    """``[begin, end)`` of runs that make up ``nbytes`` bytes, none longer than needed by more than a byte."""
    ends = [nbytes * number // num_runs for number in range(num_runs + 1)]
    return list(itertools.pairwise(ends))


def send_random(heap: Heap, peer: PeerHeap, num_rounds: int) -> None:
    done, ready = peer.words.arrival(0, 0, 0), peer.words.state(0)

    def wait_for_owner(number: int) -> None:
        wait_until(lambda: peer.read(ready) >= number, f"the owner before round {number}")

    def take() -> bool:
        peer.poll()
        return peer.hold(0, 0)

    for number in range(1, num_rounds + 1):
        content, source, target = _Round.draw(number, heap.layout, peer.layout)
        wait_for_owner(number)
        wait_until(take, f"the lane of round {number}")
        half = content.size // 2
        runs = cut(half, number % 7 + 1)
        # Backwards in the source, so that no two runs merge; and the later half before it.
        heap.write_data(source, np.concatenate([content[begin:end] for begin, end in reversed(runs)]))
        heap.write_data(source + half, content[half:])
        peer.put(Copies([Copy(source + half, target + half, content.size - half)]))
        peer.put(Copies(Copy(source + half - end, target + begin, end - begin) for begin, end in runs))
        peer.signal(done, number)
        peer.let_go(0, 0)
    wait_for_owner(num_rounds + 1)
    peer.poll(wait=True)


def receive_random(heap: Heap, sender: KvLayout, num_rounds: int) -> int:
    """The number of bytes that were wrong."""
    done, ready = heap.words.arrival(0, 0, 0), heap.words.state(0)
    num_wrong = 0

    def has_come(number: int) -> bool:
        heap.poll()
        os.sched_yield()
        return heap.load(done) >= number

    set_data(heap, POISON_BYTE)
    # Not sooner: the writer may have begun to run long ago.
    heap.store(ready, 1)
    for number in range(1, num_rounds + 1):
        expected = np.full(heap.layout.data_nbytes, POISON_BYTE, np.uint8)
        content, _, target = _Round.draw(number, sender, heap.layout)
        expected[target : target + content.size] = content
        wait_until(lambda number=number: has_come(number), f"round {number}")  # type: ignore[misc]
        num_wrong += int((heap.read_data(0, expected.size) != expected).sum())
        set_data(heap, POISON_BYTE)
        heap.store(ready, number + 1)
    return num_wrong
