"""The state that a hybrid model keeps of each request: in which blocks it is, and when it is kept.

    step      reads state_from, which holds it at num_computed; writes state_to
    advance   state_to is state_from from now on, and the next step goes on in place
    keep      at a length worth it: these blocks become cache, and the next step writes into new ones

A state is of use at exactly its length, and a step goes past every length but its last. So prefill stops
where one is to be kept: behind the last whole block that a next request with this prompt could go on from,
and where KV of this prompt was cached further than a state (many prompts begin so). While tokens are
generated the newest block border is kept, and that of before is dropped. Not where it would take blocks
from others.

Owns that. Under the engine's lock, as its caller KvMemory.
"""

from __future__ import annotations

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.prefix.cache import PrefixCache
from microserve.services.engine.core.request.sequence import Sequence


class States:
    def __init__(self, pool: BlockPool, cache: PrefixCache, num_blocks: int) -> None:
        """``num_blocks``: of one request's state, at least 1."""
        self._pool, self._cache = pool, cache
        self.num_blocks = num_blocks

    def match(self, sequence: Sequence) -> int:
        """Start from the longest cached prefix that has a state behind it; the sequence has no blocks yet.
        Returns its tokens."""
        limit = sequence.num_reusable
        if sequence.needs_logits:
            limit = min(limit, sequence.num_tokens - 1)  # the last token's logits need the state before it
        cached = self._cache.acquire_with_state(sequence.token_ids, limit, sequence.salt, sequence.chain)
        size = self._cache.block_size
        sequence.blocks, sequence.state_from = cached.blocks, cached.state
        matched = len(cached.blocks) * size
        last = (sequence.num_tokens - sequence.needs_logits) // size * size
        sequence.keeps = [
            each for each in sorted({cached.num_matched * size, last}) if matched < each <= last
        ]
        return matched

    def missing(self, sequence: Sequence) -> int:
        """Blocks that its next step needs for the state that it writes."""
        return 0 if sequence.state_to else self.num_blocks

    def grow(self, sequence: Sequence) -> None:
        """The pool has them."""
        if not sequence.state_to:
            sequence.state_to = self._pool.allocate(self.num_blocks)

    def adopt(self, sequence: Sequence, blocks: list[int]) -> None:
        """It goes on from a state in these blocks, which are cache or a grant's: not to be written, since a
        second writer may still put the state of the grant's end into them."""
        sequence.state_from, sequence.state_to = blocks, []

    def advance(self, sequence: Sequence, granted: list[int]) -> None:
        """A step has written it. ``granted``: blocks that are the grant table's still."""
        if sequence.state_from is not sequence.state_to:
            if sequence.state_from != granted:
                self._pool.free(sequence.state_from)
            sequence.state_from = sequence.state_to

    def keep(self, sequence: Sequence) -> None:
        """Where the sequence stands, if that is a length to keep it at: with its blocks it becomes cache."""
        length, size = sequence.num_computed, self._cache.block_size
        is_asked = bool(sequence.keeps) and length >= sequence.keeps[0]
        while sequence.keeps and length >= sequence.keeps[0]:
            sequence.keeps.pop(0)
        is_generated = length > sequence.num_prompt_tokens
        if length % size or not (is_asked or is_generated) or not self._pool.has(self.num_blocks):
            return
        num_full = length // size
        is_whole = self._cache.insert(
            sequence.token_ids,
            sequence.blocks,
            num_full,
            sequence.salt,
            start=sequence.num_inserted,
            chain=sequence.chain,
        )
        sequence.num_inserted = num_full
        name = sequence.chain.hashes[num_full - 1]
        if not is_whole or name in self._cache.states:
            return
        self._cache.states.keep(name, sequence.state_from)
        sequence.state_to = []
        if is_generated:
            if sequence.kept is not None:
                self._cache.states.drop(sequence.kept)
            sequence.kept = name

    def take(self, sequence: Sequence) -> list[int]:
        """All references that it holds, which are the caller's now."""
        blocks = list(sequence.state_from)
        if sequence.state_to is not sequence.state_from:
            blocks += sequence.state_to
        sequence.state_from, sequence.state_to, sequence.keeps = [], [], []
        return blocks
