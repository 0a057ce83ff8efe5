"""Prefix cache: any run of sequences equals a model by content, and its events rebuild it elsewhere."""

from __future__ import annotations

from hashlib import sha256
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from microserve.kvcache import block_hash
from microserve.kvcache.block_hash import HashChain, block_hashes, root_hash
from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.prefix_cache import PrefixCache
from microserve.kvcache.prefix_index import PrefixIndex
from microserve.protocol.errors import CacheFull, InternalError, InvalidInterval
from microserve.protocol.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    WireHash,
    decode_batch,
    encode_batch,
)

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


CacheAgainstModel.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestCacheAgainstModel = CacheAgainstModel.TestCase


def weak_hash(parent: bytes, packed_tokens: bytes) -> bytes:
    """Four values: most prefixes share their hash with others."""
    return bytes([sha256(parent + packed_tokens).digest()[0] & 3]) * 16


class CacheWithCollisions(CacheMachine):
    """The same life under a hash that collides all the time: ``found`` still holds for every block."""

    def __init__(self) -> None:
        super().__init__()
        self.weakened = patch.object(block_hash, "chain_hash", weak_hash)
        self.weakened.start()

    def teardown(self) -> None:
        self.weakened.stop()


CacheWithCollisions.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestCacheWithCollisions = CacheWithCollisions.TestCase


def hash_without_parent(parent: bytes, packed_tokens: bytes) -> bytes:
    """One hash for the same tokens wherever they stand; the roots of the salts stay different."""
    return sha256(packed_tokens).digest()[:16]


def test_blocks_with_one_hash_and_the_same_tokens_are_told_apart_by_their_parents(
    pool: BlockPool, cache: PrefixCache
) -> None:
    with patch.object(block_hash, "chain_hash", hash_without_parent):
        first = computed(pool, cache, [1, 1, 9, 9])
        second = computed(pool, cache, [2, 2, 9, 9, 3, 3])
        assert cache.match([1, 1, 9, 9], 4) == first
        assert cache.match([2, 2, 9, 9], 4) == second[:1]
        assert cache.match([1, 1, 9, 9, 3, 3], 6) == first
        cache.check_integrity()


def test_blocks_with_one_hash_and_one_parent_are_told_apart_by_their_tokens(
    pool: BlockPool, cache: PrefixCache
) -> None:
    # Tokens 1 and 2 have one hash, token 3 another.
    with patch.object(block_hash, "chain_hash", lambda parent, packed: bytes([packed[0] // 3]) * 16):
        first = computed(pool, cache, [1, 1])
        computed(pool, cache, [2, 2, 3, 3])
        assert cache.match([1, 1, 3, 3], 4) == first
        assert cache.match([2, 2], 2) == []
        cache.check_integrity()


def computed(
    pool: BlockPool, cache: PrefixCache, tokens: list[int], salt: str = "", insert: bool = True
) -> list[int]:
    """Blocks of a sequence that was computed without looking into the cache first."""
    blocks = pool.allocate(len(tokens) // BLOCK_SIZE)
    if insert:
        cache.insert(tokens, blocks, len(blocks), salt)
    return blocks


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(NUM_BLOCKS)


@pytest.fixture
def cache(pool: BlockPool) -> PrefixCache:
    return PrefixCache(pool, BLOCK_SIZE, MODEL)


def test_a_whole_prompt_may_match(pool: BlockPool, cache: PrefixCache) -> None:
    blocks = computed(pool, cache, [1, 2, 3, 4])
    assert cache.match([1, 2, 3, 4], 4) == blocks
    assert cache.match([1, 2, 3, 4], 3) == blocks[:1]
    assert cache.match([1, 2, 3, 4, 5], 5) == blocks
    assert cache.match([1, 2, 9, 4], 4) == blocks[:1]


def test_acquire_takes_references_and_counts(pool: BlockPool, cache: PrefixCache) -> None:
    blocks = computed(pool, cache, [1, 2, 3, 4])
    pool.free(blocks)
    assert cache.acquire([1, 2, 3, 9, 9], 4) == blocks[:1]
    assert pool.ref_count(blocks[0]) == 1
    assert (cache.queries_tokens, cache.hit_tokens) == (4, 2)
    cache.match([1, 2], 2)
    assert (cache.queries_tokens, cache.hit_tokens) == (4, 2)


def test_tenants_with_different_salts_share_nothing(pool: BlockPool, cache: PrefixCache) -> None:
    computed(pool, cache, [1, 2], salt="a")
    assert cache.match([1, 2], 2, "b") == cache.match([1, 2], 2) == []


def test_one_event_per_run_of_new_blocks(pool: BlockPool, cache: PrefixCache) -> None:
    computed(pool, cache, [1, 2, 3, 4], salt="t")
    computed(pool, cache, [1, 2, 3, 4, 5, 6, 7, 8], salt="t")
    a, b, c, d = block_hashes([1, 2, 3, 4, 5, 6, 7, 8], BLOCK_SIZE, root_hash(MODEL, salt="t"))
    assert cache.take_events() == [
        BlockStored([a, b], None, [1, 2, 3, 4], BLOCK_SIZE, extra_keys=[("t",), None]),
        BlockStored([c, d], b, [5, 6, 7, 8], BLOCK_SIZE),
    ]
    assert cache.take_events() == []


def test_snapshot_joins_what_was_stored_in_pieces(pool: BlockPool, cache: PrefixCache) -> None:
    tokens = [1, 2, 3, 4, 5, 6]
    blocks = pool.allocate(3)
    chain = cache.new_chain()
    for i in range(3):
        cache.insert(tokens, blocks, i + 1, start=i, chain=chain)
    computed(pool, cache, [1, 2, 7, 8])
    a, b, c = chain.hashes
    other = block_hashes([1, 2, 7, 8], BLOCK_SIZE, chain.root)[1]
    assert cache.snapshot() == [
        BlockStored([a, b, c], None, tokens, BLOCK_SIZE),
        BlockStored([other], a, [7, 8], BLOCK_SIZE),
    ]


def test_a_second_copy_keeps_the_first_and_its_own_successors_are_found(
    pool: BlockPool, cache: PrefixCache
) -> None:
    first = computed(pool, cache, [1, 2, 3, 4])
    second = computed(pool, cache, [1, 2, 3, 4, 5, 6])
    assert not pool.is_cached(second[0])
    assert cache.match([1, 2, 3, 4, 5, 6], 6) == [*first, second[2]]


def test_a_sequence_puts_back_what_was_evicted_from_under_it(pool: BlockPool, cache: PrefixCache) -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    first = computed(pool, cache, tokens[:4])
    second = computed(pool, cache, tokens, insert=False)
    chain = cache.new_chain()
    cache.insert(tokens, second, 3, chain=chain)  # block 2 hangs on the first sequence's blocks
    pool.free(first)
    pool.free(pool.allocate(pool.num_free))
    assert cache.match(tokens, 8) == []
    cache.check_integrity()
    cache.insert(tokens, second, 4, start=3, chain=chain)
    assert cache.match(tokens, 8) == second
    root, *_ = cache.snapshot()
    assert root.block_hashes == chain.hashes


def test_eviction_takes_what_hangs_on_a_block_with_it(pool: BlockPool, cache: PrefixCache) -> None:
    first = computed(pool, cache, [1, 2])
    second = computed(pool, cache, [1, 2, 3, 4, 5, 6])
    cache.take_events()
    pool.free(second)  # free and cached, but younger than ...
    pool.share(second[1:])
    pool.free(first)
    pool.free(second[1:])
    taken = pool.allocate(pool.num_free - 2)
    assert first[0] in taken
    hashes = block_hashes([1, 2, 3, 4, 5, 6], BLOCK_SIZE, root_hash(MODEL))
    (removed,) = cache.take_events()
    assert isinstance(removed, BlockRemoved)
    assert set(removed.block_hashes) == set(hashes)
    assert cache.num_blocks == pool.num_cached == 0


def test_evictions_of_one_step_are_one_event(pool: BlockPool, cache: PrefixCache) -> None:
    pool.free([*computed(pool, cache, [1, 2]), *computed(pool, cache, [3, 4])])
    cache.take_events()
    pool.free(pool.allocate(pool.num_blocks))
    (removed,) = cache.take_events()
    assert isinstance(removed, BlockRemoved)
    assert len(removed.block_hashes) == 2


def test_clear_keeps_blocks_in_use(pool: BlockPool, cache: PrefixCache) -> None:
    used = computed(pool, cache, [1, 2])
    pool.free(computed(pool, cache, [3, 4]))
    cache.clear()
    assert cache.take_events() == [AllBlocksCleared()]
    assert (pool.num_used, pool.num_cached, cache.num_blocks) == (1, 0, 0)
    assert cache.match([1, 2], 2) == []
    assert cache.snapshot() == []
    cache.insert([1, 2], used, 1)
    assert cache.match([1, 2], 2) == used


@pytest.mark.parametrize("end", [-1, 3])
def test_match_refuses_an_end_outside_the_prompt(cache: PrefixCache, end: int) -> None:
    with pytest.raises(InvalidInterval) as caught:
        cache.match([1, 2], end)
    assert caught.value.field == "end"


def test_misuse_is_an_internal_error(pool: BlockPool, cache: PrefixCache) -> None:
    blocks = computed(pool, cache, [1, 2, 3, 4])
    tokens = [5, 6, 7, 8]
    with pytest.raises(InternalError, match="blocks 1 to 0"):
        cache.insert(tokens, blocks, 0, start=1)
    with pytest.raises(InternalError, match="of 2 blocks"):
        cache.insert([*tokens, 9, 9], blocks, 3)
    with pytest.raises(InternalError, match="3 tokens"):
        cache.insert(tokens[:3], blocks, 2)
    with pytest.raises(InternalError, match="other tokens"):
        cache.insert(tokens, blocks, 2, start=1)
    with pytest.raises(InternalError, match="mark_cached"):
        cache.insert(tokens, blocks, 1)
    with pytest.raises(InternalError, match="mark_cached"):
        cache.insert(tokens, [9], 1)
    with pytest.raises(InternalError, match="hash chain"):
        cache.match(tokens, 4, chain=cache.new_chain("other"))
