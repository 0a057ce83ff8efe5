"""What an index keeps of blocks: the engines that hold them, in two generations, and the walk along a prompt.

    young   stored or found by a lookup since this generation began
    old     not used since then; forgotten as a whole when room is needed

One hash names a whole prefix, so a flat map does what a tree would, without splits and merges.

A lookup walks the chain from its start and ANDs the owners; it does not search. Matched length is monotone
along a chain only while no engine loses a block before its successors, which no foreign engine promises. And
a search must hash the whole prompt first, which costs more than walking all of it does, while a walk stops
hashing at the first block that nobody holds.

Owns the promises; ``native/`` keeps them in C++ and ``python_blocks.py`` in Python. Must not know events,
other people's names of blocks, nor when there is too much.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

Held = Iterable[tuple[bytes, list[int]]]
"""Blocks by their hash, or its beginning, and the numbers of the engines that hold them."""


class Blocks(Protocol):
    """Engines have numbers, as small as may be; hashes have 16 bytes. Sequences are lists, and no others."""

    @property
    def num_blocks(self) -> int:
        """Distinct blocks, each counted once however many engines hold it."""
        ...

    @property
    def num_young(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes of tables and objects, as the allocator was asked for them."""
        ...

    @property
    def growth_nbytes(self) -> int:
        """So many bytes more at most once its tables have grown, which they do at once."""
        ...

    def join(self, engine: int, engine_id: str, /) -> None:
        """The number has this name from now on; no block has it yet."""
        ...

    def store(self, engine: int, names: list[bytes], /) -> int:
        """The engine holds these, which are young. How many of them were no hash, and are left out."""
        ...

    def remove(self, engine: int, names: list[bytes], /) -> None:
        """It does not hold these any more; unknown ones are fine."""
        ...

    def forget(self, engine: int, /) -> None:
        """It holds nothing any more; O(blocks), once per engine that dies or is replaced: a set of blocks for
        each engine instead would double the memory. Gives room back."""
        ...

    def lookup(self, root: bytes, tokens: list[int], /) -> dict[str, int]:
        """Engine id -> tokens of the prompt behind the hash ``root`` that it holds from the start, those that
        hold least first, else by number. Raises what ``HashChain.extend`` raises."""
        ...

    def lookup_hashes(self, hashes: list[bytes], /) -> dict[str, int]: ...

    def age(self) -> int:
        """A new generation begins. How many old blocks are forgotten."""
        ...

    def take_moved(self) -> bool:
        """Has a lookup made old blocks young since the last call?"""
        ...

    def holds(self, block_hash: bytes, /) -> bool:
        """Does anybody hold it?"""
        ...

    def generations(self) -> tuple[Held, Held]:
        """All young and all old blocks, for tests and checks."""
        ...
