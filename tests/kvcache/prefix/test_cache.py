"""Prefix cache, by example: what is found, what is announced, what is refused."""

from __future__ import annotations

from hashlib import sha256
from unittest.mock import patch

import pytest

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.prefix import hash as block_hash
from microserve.kvcache.prefix.cache import PrefixCache
from microserve.kvcache.prefix.hash import block_hashes, root_hash
from microserve.protocol.errors import InternalError, InvalidInterval
from microserve.protocol.messages.kv.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
)

BLOCK_SIZE = 2
NUM_BLOCKS = 10
MODEL = "model"


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


def hash_without_parent(parent: bytes, packed_tokens: bytes) -> bytes:
    """One hash for the same tokens wherever they stand; the roots of the salts stay different."""
    return sha256(packed_tokens).digest()[:16]


def test_blocks_with_one_hash_and_the_same_tokens_are_told_apart_by_their_parents(
    pool: BlockPool, cache: PrefixCache
) -> None:
    with patch.multiple(block_hash, chain_hash=hash_without_parent, extension=lambda: None):
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
    def hash_of_third(parent: bytes, packed: bytes) -> bytes:
        return bytes([packed[0] // 3]) * 16

    with patch.multiple(block_hash, chain_hash=hash_of_third, extension=lambda: None):
        first = computed(pool, cache, [1, 1])
        computed(pool, cache, [2, 2, 3, 3])
        assert cache.match([1, 1, 3, 3], 4) == first
        assert cache.match([2, 2], 2) == []
        cache.check_integrity()


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
