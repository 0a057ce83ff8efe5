"""Prefix cache: any run of sequences equals a model by content, and its events rebuild it elsewhere."""

from __future__ import annotations

from hashlib import sha256
from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.prefix import hash as block_hash
from microserve.kvcache.prefix.cache import PrefixCache
from microserve.kvcache.prefix.hash import HashChain, block_hashes, root_hash
from microserve.kvcache.prefix.index import PrefixIndex
from microserve.protocol.errors import CacheFull
from microserve.protocol.messages.kv.kv_decoding import decode_batch
from microserve.protocol.messages.kv.kv_events import (
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    WireHash,
    encode_batch,
)
from tests.support.examples import examples

BLOCK_SIZE = 2
NUM_BLOCKS = 10
MODEL = "model"
INDEX_NBYTES = 1 << 20

# Two tokens and two salts make prefixes that meet often.
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=12)
SALTS = st.sampled_from(["", "tenant"])

Prefix = tuple[str, tuple[int, ...]]
"""Salt and every token up to the end of a block: all that the block's KV depends on."""


class Sequence:
    """What an engine keeps of one running sequence."""

    def __init__(self, tokens: list[int], salt: str, chain: HashChain | None) -> None:
        self.tokens = tokens
        self.salt = salt
        self.chain = chain
        self.blocks: list[int] = []
        self.num_inserted = 0

    @property
    def num_full(self) -> int:
        return len(self.tokens) // BLOCK_SIZE

    def prefix(self, i: int) -> Prefix:
        return self.salt, tuple(self.tokens[: (i + 1) * BLOCK_SIZE])


class CacheMachine(RuleBasedStateMachine):
    """Sequences come, grow, insert what they have computed, and go."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.cache = PrefixCache(self.pool, BLOCK_SIZE, MODEL)
        self.running: list[Sequence] = []
        self.content: dict[int, Prefix] = {}
        """What was last computed into each block."""

    def pick(self, data: st.DataObject) -> Sequence | None:
        return data.draw(st.sampled_from(self.running)) if self.running else None

    def allocate(self, sequence: Sequence) -> None:
        missing = -(-len(sequence.tokens) // BLOCK_SIZE) - len(sequence.blocks)
        sequence.blocks += self.taken(self.pool.allocate(missing))

    def taken(self, blocks: list[int]) -> list[int]:
        for block in blocks:
            self.content.pop(block, None)
        return blocks

    def found(self, sequence: Sequence, blocks: list[int]) -> None:
        """Every block handed out holds exactly what the sequence would have computed."""
        assert [self.content[block] for block in blocks] == [sequence.prefix(i) for i in range(len(blocks))]

    @rule(tokens=TOKENS, salt=SALTS, with_chain=st.booleans(), data=st.data())
    def start(self, tokens: list[int], salt: str, with_chain: bool, data: st.DataObject) -> None:
        sequence = Sequence(tokens, salt, self.cache.new_chain(salt) if with_chain else None)
        end = data.draw(st.integers(0, len(tokens)))
        sequence.blocks = self.cache.acquire(tokens, end, salt, sequence.chain)
        self.found(sequence, sequence.blocks)
        sequence.num_inserted = len(sequence.blocks)
        try:
            self.allocate(sequence)
        except CacheFull:
            self.pool.free(sequence.blocks)
            return
        self.running.append(sequence)

    @rule(token=st.integers(0, 1), count=st.integers(1, 3), data=st.data())
    def grow(self, token: int, count: int, data: st.DataObject) -> None:
        sequence = self.pick(data)
        if sequence is None or self.pool.num_free < 2:
            return
        sequence.tokens += [token] * count
        self.allocate(sequence)

    @rule(data=st.data(), repeat=st.booleans())
    def insert(self, data: st.DataObject, repeat: bool) -> None:
        sequence = self.pick(data)
        if sequence is None:
            return
        start = 0 if repeat else sequence.num_inserted
        num_full = data.draw(st.integers(sequence.num_inserted, sequence.num_full))
        for i in range(sequence.num_inserted, num_full):
            self.content[sequence.blocks[i]] = sequence.prefix(i)
        self.inserting(sequence, start, num_full)
        self.cache.insert(
            sequence.tokens, sequence.blocks, num_full, sequence.salt, start=start, chain=sequence.chain
        )
        sequence.num_inserted = num_full

    def inserting(self, sequence: Sequence, start: int, num_full: int) -> None:
        """For the model."""

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        sequence = self.pick(data)
        if sequence is not None:
            self.running.remove(sequence)
            self.pool.free(sequence.blocks)

    @rule(tokens=TOKENS, salt=SALTS)
    def query(self, tokens: list[int], salt: str) -> None:
        self.found(Sequence(tokens, salt, None), self.cache.match(tokens, len(tokens), salt))

    @invariant()
    def intact(self) -> None:
        self.pool.check_integrity()
        self.cache.check_integrity()


class CacheAgainstModel(CacheMachine):
    """``self.cached`` is the model: which block is known for which content."""

    def __init__(self) -> None:
        super().__init__()
        self.cached: dict[Prefix, int] = {}
        self.held: set[WireHash] = set()
        """The cache as a reader of its events sees it."""
        self.index = PrefixIndex(BLOCK_SIZE, MODEL, INDEX_NBYTES)

    def taken(self, blocks: list[int]) -> list[int]:
        gone = [prefix for prefix, block in self.cached.items() if block in blocks]
        for salt, tokens in gone:
            for other in list(self.cached):
                if other[0] == salt and other[1][: len(tokens)] == tokens:
                    del self.cached[other]
        return super().taken(blocks)

    def inserting(self, sequence: Sequence, start: int, num_full: int) -> None:
        if start < num_full:
            for i in range(num_full):
                self.cached.setdefault(sequence.prefix(i), sequence.blocks[i])

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.cached.clear()

    def matched(self, tokens: list[int], end: int, salt: str) -> list[int]:
        blocks = []
        for stop in range(BLOCK_SIZE, end + 1, BLOCK_SIZE):
            block = self.cached.get((salt, tuple(tokens[:stop])))
            if block is None:
                break
            blocks.append(block)
        return blocks

    @rule(tokens=TOKENS, salt=SALTS, data=st.data())
    def match_equals_model(self, tokens: list[int], salt: str, data: st.DataObject) -> None:
        end = data.draw(st.integers(0, len(tokens)))
        assert self.cache.match(tokens, end, salt) == self.matched(tokens, end, salt)

    @rule()
    def events_rebuild_the_cache(self) -> None:
        events = self.cache.take_events()
        for event in events:
            if isinstance(event, BlockStored):
                assert event.parent_block_hash is None or event.parent_block_hash in self.held
                assert not self.held & set(event.block_hashes)
                assert event.block_size == BLOCK_SIZE
                assert len(event.token_ids) == len(event.block_hashes) * BLOCK_SIZE
                self.held |= set(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                assert self.held >= set(event.block_hashes)
                self.held -= set(event.block_hashes)
            else:
                self.held.clear()
        truth = {
            block_hashes(tokens, BLOCK_SIZE, root_hash(MODEL, salt=salt))[-1] for salt, tokens in self.cached
        }
        assert self.held == truth
        self.index.apply("live", decode_batch(encode_batch(KVEventBatch(0.0, events))).events)
        self.index.replace("snapshot", self.cache.snapshot())
        for sequence in self.running:
            matched = len(self.matched(sequence.tokens, len(sequence.tokens), sequence.salt)) * BLOCK_SIZE
            expected = {"live": matched, "snapshot": matched} if matched else {}
            assert self.index.lookup(sequence.tokens, sequence.salt) == expected
        assert self.index.num_blocks == len(self.cached) == self.cache.num_blocks


CacheAgainstModel.TestCase.settings = settings(
    max_examples=examples(100), stateful_step_count=40, deadline=None
)
TestCacheAgainstModel = CacheAgainstModel.TestCase


def weak_hash(parent: bytes, packed_tokens: bytes) -> bytes:
    """Four values: most prefixes share their hash with others."""
    return bytes([sha256(parent + packed_tokens).digest()[0] & 3]) * 16


class CacheWithCollisions(CacheMachine):
    """The same life under a hash that collides all the time: ``found`` still holds for every block."""

    def __init__(self) -> None:
        super().__init__()
        self.weakened = patch.multiple(block_hash, chain_hash=weak_hash, extension=lambda: None)
        self.weakened.start()

    def teardown(self) -> None:
        self.weakened.stop()


CacheWithCollisions.TestCase.settings = settings(
    max_examples=examples(80), stateful_step_count=40, deadline=None
)
TestCacheWithCollisions = CacheWithCollisions.TestCase
