"""States of hybrid models at the ends of cached prefixes: a request goes on from one, at exactly its length.

    cached blocks   0..16  16..32  32..48  48..64      KV: any beginning of them is of use
    states                    └ S           └ S        only a prefix of 32 or of 64 tokens can be gone on from

A state takes blocks of the same pool as KV; they are cached blocks, so they are evicted as those are, least
recently used first. One that loses a block, or the block that it stands behind, is gone.

Owns which state stands behind which block. Takes no references. Knows no tokens (cache.py does).
"""

from __future__ import annotations

from collections.abc import Sequence

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.prefix.hash import BlockHash
from microserve.protocol.errors import InternalError


class CachedStates:
    """By the hash of the last block of the prefix."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._by_hash: dict[BlockHash, tuple[int, ...]] = {}
        self._by_block: dict[int, BlockHash] = {}

    def __len__(self) -> int:
        return len(self._by_hash)

    def __contains__(self, block_hash: BlockHash) -> bool:
        return block_hash in self._by_hash

    def blocks_of(self, block_hash: BlockHash) -> list[int]:
        """Empty where there is none."""
        return list(self._by_hash.get(block_hash, ()))

    def has_block(self, block: int) -> bool:
        return block in self._by_block

    def keep(self, block_hash: BlockHash, blocks: Sequence[int]) -> None:
        """``blocks`` hold it, complete, and are written no more; the caller holds a reference on each. Raises
        :class:`InternalError` where there is one already."""
        if not blocks or block_hash in self._by_hash:
            raise InternalError(
                f"keep: a state of {len(blocks)} blocks, known: {block_hash in self._by_hash}"
            )
        for block in blocks:
            self._pool.mark_cached(block)
            self._by_block[block] = block_hash
        self._by_hash[block_hash] = tuple(blocks)

    def drop(self, block_hash: BlockHash) -> None:
        """Nobody finds it any more, if there is one; blocks in use stay in use."""
        for block in self._by_hash.pop(block_hash, ()):
            del self._by_block[block]
            self._pool.unmark_cached(block)

    def take(self, block: int) -> None:
        """The pool has taken one of its blocks."""
        block_hash = self._by_block.pop(block)
        for other in self._by_hash.pop(block_hash):
            if other != block:
                del self._by_block[other]
                self._pool.unmark_cached(other)

    def clear(self) -> None:
        for block_hash in list(self._by_hash):
            self.drop(block_hash)

    def check_integrity(self) -> None:
        """Raises :class:`InternalError` that says what is broken."""
        found = {block: name for name, blocks in self._by_hash.items() for block in blocks}
        if found != self._by_block:
            raise InternalError("states and their blocks do not know each other")
        if missing := [block for block in found if not self._pool.is_cached(block)]:
            raise InternalError(f"blocks {missing} of states are not cached")
