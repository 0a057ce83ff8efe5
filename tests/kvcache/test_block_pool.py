"""Block pool: any run of calls equals a model that keeps the free list as a plain list."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from microserve.kvcache.block_pool import BlockPool
from microserve.protocol.errors import CacheFull, ConfigError, InternalError
from tests.support.examples import examples

NUM_BLOCKS = 9


class PoolAgainstModel(RuleBasedStateMachine):
    """``self.free`` is the free list from head to tail; the pool must agree on its very order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = self.make()
        self.evicted: list[int] = []
        self.pool.on_evict = self.evicted.append
        self.free = list(range(NUM_BLOCKS))
        self.refs = [0] * NUM_BLOCKS
        self.cached: set[int] = set()
        self.quarantined: set[int] = set()

    def make(self) -> BlockPool:
        return BlockPool(NUM_BLOCKS)

    def drop(self, block: int) -> None:
        self.refs[block] -= 1
        if self.refs[block] == 0:
            self.free.insert(len(self.free) if block in self.cached else 0, block)

    @rule(count=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, count: int) -> None:
        if count > len(self.free):
            with pytest.raises(CacheFull) as caught:
                self.pool.allocate(count)
            assert caught.value.retry_after_s > 0
            return
        expected, self.free = self.free[:count], self.free[count:]
        self.evicted.clear()
        assert self.pool.allocate(count) == expected
        assert self.evicted == [block for block in expected if block in self.cached]
        self.cached -= set(expected)
        for block in expected:
            self.refs[block] = 1

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def share(self, block: int) -> None:
        if self.refs[block] == 0 and block not in self.cached:
            with pytest.raises(InternalError):
                self.pool.share([block])
            return
        self.pool.share([block])
        if self.refs[block] == 0:
            self.free.remove(block)
        self.refs[block] += 1

    @rule(data=st.data())
    def free_some(self, data: st.DataObject) -> None:
        held = [block for block in range(NUM_BLOCKS) for _ in range(self.refs[block])]
        blocks = data.draw(st.permutations(held))[: data.draw(st.integers(0, len(held)))]
        self.pool.free(blocks)
        for block in reversed(blocks):
            self.drop(block)

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def free_too_often(self, block: int) -> None:
        if self.refs[block] == 0:
            with pytest.raises(InternalError):
                self.pool.free([block])

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def quarantine(self, block: int) -> None:
        if self.refs[block] == 1 and block not in self.cached:
            self.pool.quarantine([block])
            self.refs[block] = 0
            self.quarantined.add(block)
        else:
            with pytest.raises(InternalError):
                self.pool.quarantine([block])

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def discharge(self, block: int) -> None:
        if block in self.quarantined:
            self.pool.discharge([block])
            self.quarantined.discard(block)
            self.free.insert(0, block)
        else:
            with pytest.raises(InternalError):
                self.pool.discharge([block])

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def mark_cached(self, block: int) -> None:
        if self.refs[block] > 0 and block not in self.cached:
            self.pool.mark_cached(block)
            self.cached.add(block)
        else:
            with pytest.raises(InternalError):
                self.pool.mark_cached(block)

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def unmark_cached(self, block: int) -> None:
        if block not in self.cached:
            with pytest.raises(InternalError):
                self.pool.unmark_cached(block)
            return
        self.pool.unmark_cached(block)
        self.cached.discard(block)
        if self.refs[block] == 0:
            self.free.remove(block)
            self.free.insert(0, block)

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert [self.pool.ref_count(block) for block in range(NUM_BLOCKS)] == self.refs
        assert {block for block in range(NUM_BLOCKS) if self.pool.is_cached(block)} == self.cached
        assert self.pool.num_free == len(self.free)
        assert self.pool.num_cached == len(self.cached & set(self.free))
        assert self.pool.num_quarantined == len(self.quarantined)
        assert self.pool.num_used == sum(count > 0 for count in self.refs)


class GrowingPoolAgainstModel(PoolAgainstModel):
    """Blocks that get their memory as they are wanted are handed out in the same order."""

    def make(self) -> BlockPool:
        return BlockPool(NUM_BLOCKS, lambda first, count: first + max(count, 2))


PoolAgainstModel.TestCase.settings = settings(
    max_examples=examples(100), stateful_step_count=40, deadline=None
)
GrowingPoolAgainstModel.TestCase.settings = PoolAgainstModel.TestCase.settings
TestPoolAgainstModel = PoolAgainstModel.TestCase
TestGrowingPoolAgainstModel = GrowingPoolAgainstModel.TestCase


def test_memory_is_asked_for_when_no_uncached_block_has_some() -> None:
    asked: list[tuple[int, int]] = []

    def back(first: int, count: int) -> int:
        asked.append((first, count))
        return first + max(count, 4)

    pool = BlockPool(16, back)
    assert (pool.num_free, pool.num_used, asked) == (16, 0, [])
    held = pool.allocate(3)
    pool.free(held)
    pool.free(pool.allocate(4))
    assert asked == [(0, 3)]
    assert pool.allocate(6) == [0, 1, 2, 3, 4, 5]
    assert asked == [(0, 3), (4, 2)]


def test_where_there_is_no_memory_cached_blocks_are_taken_and_then_none() -> None:
    limit = 4
    pool = BlockPool(16, lambda first, count: max(first, min(first + count, limit)))
    cached = cached_blocks(pool, 3)
    pool.free(cached)
    assert pool.num_free == 16
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]  # one that nobody had, and then those with prefixes
    assert pool.num_free == 0
    with pytest.raises(CacheFull):
        pool.allocate(1)
    pool.check_integrity()
    pool.look_for_memory()
    assert not pool.has(1)
    assert pool.num_free == 0  # what it cannot hand out is not told either
    limit = 16
    assert not pool.has(12)
    pool.look_for_memory()
    assert pool.has(12)
    assert pool.num_free == 12
    assert pool.allocate(12) == list(range(4, 16))
    pool.check_integrity()


def cached_blocks(pool: BlockPool, count: int) -> list[int]:
    blocks = pool.allocate(count)
    for block in blocks:
        pool.mark_cached(block)
    return blocks


def test_the_end_of_a_chain_is_evicted_first() -> None:
    pool = BlockPool(4)
    chain = cached_blocks(pool, 3)
    pool.free(chain)
    assert pool.allocate(3) == [3, chain[2], chain[1]]
    assert pool.is_cached(chain[0])


def test_what_was_used_last_is_evicted_last() -> None:
    pool = BlockPool(3)
    blocks = cached_blocks(pool, 3)
    for block in blocks:
        pool.free([block])
    pool.share([blocks[0]])
    pool.free([blocks[0]])
    assert pool.allocate(3) == [blocks[1], blocks[2], blocks[0]]


def test_nothing_is_taken_when_there_is_too_little() -> None:
    pool = BlockPool(4)
    pool.allocate(2)
    with pytest.raises(CacheFull, match="3 blocks needed, 2 free"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_eviction_may_uncache_other_free_blocks() -> None:
    pool = BlockPool(3)
    chain = cached_blocks(pool, 3)
    pool.free([chain[0]])  # the root of the chain alone, so it is taken first
    pool.free(chain[1:])
    evicted = []

    def drop_the_rest(block: int) -> None:
        evicted.append(block)
        for other in chain:
            if pool.is_cached(other):
                pool.unmark_cached(other)

    pool.on_evict = drop_the_rest
    assert sorted(pool.allocate(3)) == chain
    assert evicted == [chain[0]]
    pool.check_integrity()


@pytest.mark.parametrize("block", [-1, 4])
def test_an_id_outside_the_pool_is_refused(block: int) -> None:
    pool = BlockPool(4)
    pool.allocate(4)
    for call in (pool.free, pool.share, pool.quarantine, pool.discharge):
        with pytest.raises(InternalError, match="outside 0 to 3"):
            call([block])
    for name in ("ref_count", "is_cached", "mark_cached", "unmark_cached"):
        with pytest.raises(InternalError, match="outside 0 to 3"):
            getattr(pool, name)(block)


def test_bounds_of_arguments() -> None:
    with pytest.raises(ConfigError) as caught:
        BlockPool(0)
    assert caught.value.field == "num_blocks"
    with pytest.raises(InternalError):
        BlockPool(1).allocate(-1)


@pytest.mark.parametrize(
    ("attribute", "index", "value"),
    [
        ("_ref_counts", 0, 0),  # used, but counted as nothing
        ("_ref_counts", 3, 1),  # free, but with a reference
        ("_quarantined", 3, 1),
        ("_cached", 1, 1),  # quarantined and cached
        ("_cached", 3, 1),  # free and cached, but not counted so
        ("_next", 3, 3),  # a loop
        ("_next", 4, 4),  # the list's end in its middle
        ("_prev", 5, 3),
        ("_prev", 6, 3),  # the tail
    ],
)
def test_check_integrity_sees_damage(attribute: str, index: int, value: int) -> None:
    pool = BlockPool(6)
    pool.allocate(2)
    pool.quarantine([1])
    pool.check_integrity()
    getattr(pool, attribute)[index] = value
    with pytest.raises(InternalError):
        pool.check_integrity()


@pytest.mark.parametrize("counter", ["_num_free", "_num_free_cached", "_num_quarantined"])
def test_check_integrity_sees_a_wrong_count(counter: str) -> None:
    pool = BlockPool(6)
    setattr(pool, counter, getattr(pool, counter) + 1)
    with pytest.raises(InternalError):
        pool.check_integrity()
