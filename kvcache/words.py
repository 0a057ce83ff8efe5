"""The control words beside the KV: where each lies, and how its value is packed.

    slot[slot]            STATE and padding, then MAX_LANES lanes
      lane[lane]          CLAIM WRITER BEGIN END FIRST_TOKEN, arrival[layer], checksum[layer], padding
    tag[layer][block]

A word is 8 bytes, little-endian. Every word has one writer at a time: STATE is the receiver's; the words
of a lane belong to the process that holds the lane (heap.py), and a slot is used again only when nobody
holds any of its lanes. A tag has two writers where two lanes meet inside a block: both write the same
value. Of blocks that came as a payload the receiver sets the tag, once their rows stand there.

Nothing is ever reset. STATE, CLAIM, BEGIN, END, FIRST_TOKEN and arrival carry the generation, the use number
of the slot, so what an earlier use left behind cannot be mistaken; a lane means nothing until its CLAIM,
BEGIN and END carry the current generation.

    STATE         generation << 8 | OPEN or CLOSED
    CLAIM         generation << 8 | CLAIMED, + CHECKSUMMED, + ENCODED
    BEGIN, END    generation << 32 | token position
    arrival       generation << 32 | tokens arrived since BEGIN, + POISON
    FIRST_TOKEN   generation << 32 | token id + 1
    checksum      crc32 of the K rows << 32 | crc32 of the V rows
    tag           grant_tag of who wrote last; payload_tag of it: a codec's payload, no rows

Owns indices and bit patterns. Knows no memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.kv.grant import MAX_LANES

MAX_GENERATION = (1 << 30) - 1
"""A slot is not used more often: bit 62 of a word is POISON."""
DEFAULT_NUM_SLOTS = 256
WORD_NBYTES = 8

OPEN, CLOSED = 1, 2
CLAIMED, CHECKSUMMED, ENCODED = 1, 2, 4
"""``ENCODED``: the lane may bring payloads of a codec, and no other lane brings any of its tokens."""
POISON = 1 << 62
_LOW = (1 << 32) - 1

_LINE = 8  # words in a cache line: two lanes never share one
_CLAIM, _WRITER, _BEGIN, _END, _FIRST_TOKEN, _ARRIVAL = range(6)


@dataclass(frozen=True, slots=True)
class WordLayout:
    """Indices into the word region of a heap."""

    num_slots: int
    num_layers: int
    num_blocks: int
    num_words: int = field(init=False)
    _lane_words: int = field(init=False)
    _slot_words: int = field(init=False)
    _tags: int = field(init=False)

    def __post_init__(self) -> None:
        if self.num_slots < 1:
            raise ConfigError(f"num_slots is {self.num_slots}, at least 1", field="num_slots")
        lane_words = -(-(_ARRIVAL + 2 * self.num_layers) // _LINE) * _LINE
        slot_words = _LINE + MAX_LANES * lane_words
        tags = self.num_slots * slot_words
        object.__setattr__(self, "_lane_words", lane_words)
        object.__setattr__(self, "_slot_words", slot_words)
        object.__setattr__(self, "_tags", tags)
        object.__setattr__(self, "num_words", tags + self.num_layers * self.num_blocks)

    @property
    def num_slot_words(self) -> int:
        """Words of all slots; the tags follow."""
        return self._tags

    def state(self, slot: int) -> int:
        return slot * self._slot_words

    def claim(self, slot: int, lane: int) -> int:
        return self._lane(slot, lane) + _CLAIM

    def writer(self, slot: int, lane: int) -> int:
        """Incarnation of the writer, for people who ask who holds a block."""
        return self._lane(slot, lane) + _WRITER

    def begin(self, slot: int, lane: int) -> int:
        return self._lane(slot, lane) + _BEGIN

    def end(self, slot: int, lane: int) -> int:
        return self._lane(slot, lane) + _END

    def first_token(self, slot: int, lane: int) -> int:
        return self._lane(slot, lane) + _FIRST_TOKEN

    def arrival(self, slot: int, lane: int, layer: int) -> int:
        return self._lane(slot, lane) + _ARRIVAL + layer

    def arrivals(self, slot: int, lane: int) -> NDArray[np.int64]:
        """The arrival words of all layers, in order."""
        start = self.arrival(slot, lane, 0)
        return np.arange(start, start + self.num_layers)

    def checksum(self, slot: int, lane: int, layer: int) -> int:
        return self._lane(slot, lane) + _ARRIVAL + self.num_layers + layer

    def tags(self, layer: int, blocks: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """The tag words of ``blocks`` in one layer; who asks for several gives an array."""
        return np.asarray(blocks, np.int64) + (self._tags + layer * self.num_blocks)

    def _lane(self, slot: int, lane: int) -> int:
        return slot * self._slot_words + _LINE + lane * self._lane_words


def pack_state(generation: int, state: int) -> int:
    """Also packs CLAIM, from its flags."""
    return generation << 8 | state


def generation_of(word: int) -> int:
    """Of STATE and CLAIM; 0: none has been there."""
    return word >> 8


def pack_count(generation: int, count: int) -> int:
    """Packs BEGIN, END, arrival and FIRST_TOKEN."""
    return generation << 32 | count


def count_of(word: int, generation: int) -> int | None:
    """The low half of a BEGIN, END, arrival or FIRST_TOKEN word, or None if another generation wrote it."""
    return word & _LOW if (word & ~POISON) >> 32 == generation else None


def grant_tag(incarnation: int, slot: int, generation: int) -> int:
    """What the writers of one grant leave beside every block that they touch; never 0."""
    name = f"{incarnation}/{slot}/{generation}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") | 1


def payload_tag(tag: int) -> int:
    """What a writer leaves instead beside blocks that hold a piece of a payload."""
    return tag ^ 2
