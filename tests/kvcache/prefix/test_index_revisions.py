"""Prefix index: revisions of a model share no block, and other people's engines are followed beside them."""

from __future__ import annotations

import pytest

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.prefix.cache import PrefixCache
from microserve.kvcache.prefix.hash import block_hashes, root_hash
from microserve.protocol.messages.kv.kv_events import BlockStored
from tests.support.kvcache.prefix_indexes import FORMS, new_index

BLOCK_SIZE = 2
MODEL = "model"
LARGE = 1 << 30


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_revisions_of_a_model_share_no_block(form: str) -> None:
    """What an engine of one revision stores is found under it, and under no other."""
    pool, tokens = BlockPool(8), [1, 2, 3, 4, 5, 6]
    cache = PrefixCache(pool, BLOCK_SIZE, MODEL, revision="one")
    for salt in ("", "tenant"):
        cache.insert(tokens, pool.allocate(3), 3, salt)
    events = cache.take_events()
    for revision, found in (("one", {"e": 6}), ("two", {}), ("", {})):
        index = new_index(form, BLOCK_SIZE, MODEL, LARGE, revision="one")
        index.apply("e", events)
        index.check_integrity()
        for salt in ("", "tenant"):
            root = root_hash(MODEL, salt=salt, revision=revision)
            assert index.lookup_hashes(block_hashes(tokens, BLOCK_SIZE, root)) == found
            assert index.lookup(tokens, salt) == {"e": 6}
    assert index.lookup(tokens, "another") == {}


def test_an_engine_that_is_not_ours_is_followed_beside_a_revision(form: str) -> None:
    """Its names are translated, whatever it calls its blocks."""
    index = new_index(form, BLOCK_SIZE, MODEL, LARGE, revision="one")
    index.apply("foreign", [BlockStored([11, 12], None, [1, 2, 3, 4], BLOCK_SIZE)])
    assert index.lookup([1, 2, 3, 4]) == {"foreign": 4}
