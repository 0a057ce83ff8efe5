"""What a door is: it takes puts and signals of remote writers from a network, and applies them to a heap.

The three promises (heap.py), for writers that come through a door:

Order    A door applies what one writer sends in the order in which it was sent.
Holding  A door takes the lane's byte lock in the heap's memfd before it says "yours": another door, and
         every writer of the host, find it taken. STATE is loaded after the lock was taken, and goes out with
         the answer.
Proof    The lock goes back when nothing that its writer has sent can be applied any more: its ``let_go``
         came behind its puts, or the door has torn the connection down. By what fence a late write is
         impossible is each kind's to say. A silent writer is torn down, whether frozen, cut off or dead;
         until then it holds its lanes, and its blocks are in quarantine. A lane of which no claim had come
         is given up in its name: it may have put everything into its end of the connection, and be done.

A door has a description of the memfd of its own, never its owner's: a description may take its own lock
again, and giving it back then would free a lane that a writer holds.

Owns the interface. Knows no kind of network.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from microserve.kvcache.heap.memfd import HeapFile, lane_byte
from microserve.kvcache.layout import KvLayout
from microserve.kvcache.words import POISON, generation_of, pack_count
from microserve.protocol.messages.kv.grant import MAX_LANES, HeapAddress

SECRET_NBYTES: Final = 32
SILENCE_S: Final = 10.0
"""A connection over which nothing comes for so long is torn down; living ones say something four times in
it."""


def new_secret() -> bytes:
    """What a writer must know. It travels in grants alone, over the mesh's authenticated sockets."""
    return secrets.token_bytes(SECRET_NBYTES)


class Entrance(msgspec.Struct, frozen=True, array_like=True):
    """What is in ``HeapAddress.door``, as msgpack, of every kind."""

    secret: bytes
    where: bytes
    """For ``tcp`` HOST:PORT, for ``nixl`` its agent's metadata."""


class Door(ABC):
    """For the owner of a heap. Works by itself, in a thread of its own, until it is closed."""

    address: HeapAddress
    """Of this way into the heap: what a grant carries."""

    @abstractmethod
    def close(self) -> None:
        """Tear all writers down and free their lanes. Idempotent. Before the heap is closed."""


class DoorLanes:
    """The lanes that the writers of one door hold, and the heap that they write to.

    For the door's thread alone. A writer is any hashable.
    """

    def __init__(self, file: HeapFile) -> None:
        """``file``: a description of its own."""
        self._file = file
        self._words: NDArray[np.uint64] = np.frombuffer(file.word_region, np.uint64)
        self._holders: dict[tuple[int, int], object] = {}
        self.data = file.tail
        self.words = file.words

    @property
    def layout(self) -> KvLayout:
        return self._file.header.layout

    @property
    def num_lanes(self) -> int:
        return self.words.num_slots * MAX_LANES

    def hold(self, writer: object, slot: int, lane: int) -> bool:
        if (slot, lane) in self._holders:
            return False
        try:
            is_free = self._file.lock(lane_byte(slot, lane))
        except OSError:  # no memory for a lock
            return False
        if is_free:
            self._holders[slot, lane] = writer
        return is_free

    def let_go(self, writer: object, slot: int, lane: int) -> None:
        """Nothing that the writer sent through the lane is still to be applied. Idempotent."""
        if self._holders.get((slot, lane)) is writer:
            self._file.unlock(lane_byte(slot, lane))
            del self._holders[slot, lane]

    def held_by(self, writer: object) -> list[tuple[int, int]]:
        return [lane for lane, holder in self._holders.items() if holder is writer]

    def let_go_all(self, writer: object) -> int:
        """It is torn down: nothing that it sent can be applied any more. Returns how many it held.

        Somebody may wait for the KV of a lane that was never claimed, and would wait on: nobody has touched
        it. It is given up under the grant that its slot is of now, which is the writer's or one that the
        writer came too late for; a lane that is held keeps the slot from the next one.
        """
        lanes = self.held_by(writer)
        for slot, lane in lanes:
            generation = generation_of(self.load(self.words.state(slot)))
            if generation_of(self.load(self.words.claim(slot, lane))) != generation:
                self.store(self.words.arrival(slot, lane, 0), POISON | pack_count(generation, 0))
            self.let_go(writer, slot, lane)
        return len(lanes)

    def load(self, word: int) -> int:
        return self._words.item(word)

    def store(self, word: int, value: int) -> None:
        self._words[word] = value

    def store_each(self, words: NDArray[np.uint32], value: int) -> None:
        self._words[words] = value

    def close(self) -> None:
        """With it go the locks of lanes that are held still, and the mapping."""
        self._words = np.empty(0, np.uint64)
        self.data = memoryview(b"")
        self._file.close()
