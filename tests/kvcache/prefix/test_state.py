"""States behind cached prefixes: found at their length, evicted as blocks are, gone with their block."""

from __future__ import annotations

import pytest

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.prefix.cache import PrefixCache
from microserve.protocol.errors import InternalError

pytestmark = pytest.mark.quick

TOKENS = list(range(12))


class World:
    """A pool of 8 blocks of 4 tokens; a prefix of 12 tokens is cached in three of them."""

    def __init__(self) -> None:
        self.pool = BlockPool(8)
        self.cache = PrefixCache(self.pool, 4, "m")
        self.chain = self.cache.new_chain()
        self.blocks = self.pool.allocate(3)
        assert self.cache.insert(TOKENS, self.blocks, 3, chain=self.chain)

    def keep(self, num_blocks: int, num_state: int = 2) -> list[int]:
        """A state behind so many blocks, in blocks that nobody uses any more."""
        state = self.pool.allocate(num_state)
        self.cache.states.keep(self.chain.hashes[num_blocks - 1], state)
        self.pool.free(state)
        self.check()
        return state

    def find(self, end: int = 12) -> tuple[int, int]:
        """Blocks that can be gone on from, and those that match."""
        found = self.cache.acquire_with_state(TOKENS, end, "", self.chain)
        assert bool(found.state) == bool(found.blocks)
        self.pool.free(found.state)
        self.pool.free(found.blocks)
        self.check()
        return len(found.blocks), found.num_matched

    def check(self) -> None:
        self.pool.check_integrity()
        self.cache.check_integrity()


def test_a_prefix_without_a_state_is_of_no_use() -> None:
    world = World()
    assert world.find() == (0, 3)
    world.keep(2)
    assert world.find() == (2, 3)
    assert world.find(end=8) == (2, 2)
    assert world.find(end=7) == (0, 1)


def test_one_that_loses_a_block_is_gone_and_its_prefix_stays() -> None:
    world = World()
    world.keep(2, num_state=3)
    world.pool.allocate(3)  # two that are free, and one of the state
    assert world.find() == (0, 3)
    assert world.pool.num_cached == 0
    world.keep(2)


def test_one_goes_with_the_block_that_it_stands_behind() -> None:
    world = World()
    world.pool.free(world.blocks)
    world.keep(3)
    assert world.pool.num_cached == 5
    world.pool.allocate(4)  # three that are free, and the prefix's last
    assert world.find() == (0, 2)
    assert world.pool.num_cached == 2 and len(world.cache.states) == 0


def test_one_in_use_is_dropped_and_its_blocks_stay_in_use() -> None:
    world = World()
    world.keep(3)
    found = world.cache.acquire_with_state(TOKENS, 12, "", world.chain)
    world.cache.clear()
    world.check()
    assert [world.pool.ref_count(block) for block in found.state] == [1, 1]
    world.pool.free(found.state)
    world.pool.free(found.blocks)
    world.check()


def test_a_second_one_behind_the_same_block_is_a_fault() -> None:
    world = World()
    world.keep(3)
    with pytest.raises(InternalError, match="keep"):
        world.cache.states.keep(world.chain.hashes[2], [7])
    with pytest.raises(InternalError, match="keep"):
        world.cache.states.keep(world.chain.hashes[1], [])
