"""What other people's engines say beside tokens: salts, groups, other places (WIRE.md 7.2)."""

from __future__ import annotations

from typing import Any

import pytest

from microserve.kvcache.prefix.index import PrefixIndex
from microserve.protocol.messages.kv.kv_events import BlockRemoved, BlockStored

BLOCK_SIZE = 2


@pytest.fixture
def index() -> PrefixIndex:
    return PrefixIndex(BLOCK_SIZE, "model", 1 << 20)


def stored(names: list[int], parent: int | None, tokens: list[int], **fields: Any) -> BlockStored:
    return BlockStored([*names], parent, tokens, BLOCK_SIZE, **fields)


def test_sglangs_salt_is_a_field_and_stands_in_every_event_of_a_sequence(index: PrefixIndex) -> None:
    index.apply(
        "s",
        [
            stored([1], None, [1, 2], medium="GPU", cache_salt="tenant"),
            stored([2], 1, [3, 4], medium="GPU", cache_salt="tenant"),
        ],
    )
    assert index.lookup([1, 2, 3, 4], "tenant") == {"s": 4}
    assert index.lookup([1, 2, 3, 4]) == index.lookup([1, 2, 3, 4], "other") == {}
    index.apply("s", [BlockRemoved([2], "GPU")])
    assert index.lookup([1, 2, 3, 4], "tenant") == {"s": 2}


@pytest.mark.parametrize("kind", ["sliding_window", "mamba", "chunked_local_attention"])
def test_a_group_that_keeps_no_whole_prefix_counts_for_none(index: PrefixIndex, kind: str) -> None:
    index.apply("v", [stored([1], None, [1, 2], group_idx=0, kv_cache_spec_kind=kind)])
    assert index.num_blocks == 0
    assert index.counters.ignored_blocks == 1


def test_removals_say_no_kind_and_are_the_groups(index: PrefixIndex) -> None:
    """A hybrid model: one name in two groups, and full attention is not the first of them."""
    window = stored([1], None, [1, 2], group_idx=0, kv_cache_spec_kind="sliding_window")
    full = stored([1], None, [1, 2], group_idx=1, kv_cache_spec_kind="full_attention")
    index.apply("v", [window, full, BlockRemoved([1], group_idx=0)])
    assert index.lookup([1, 2]) == {"v": 2}
    index.apply("v", [BlockRemoved([1], group_idx=1)])
    assert index.lookup([1, 2]) == {}


def test_a_new_life_may_group_otherwise(index: PrefixIndex) -> None:
    index.apply("v", [stored([1], None, [1, 2], group_idx=0, kv_cache_spec_kind="mamba")])
    index.replace("v", [stored([1], None, [1, 2], group_idx=0)])
    assert index.lookup([1, 2]) == {"v": 2}


def test_unknown_kinds_are_as_if_not_said(index: PrefixIndex) -> None:
    index.apply("v", [stored([1], None, [1, 2], kv_cache_spec_kind="unknown")])
    index.apply("v", [stored([2], None, [3, 4], group_idx=1, kv_cache_spec_kind="unknown")])
    assert (index.lookup([1, 2]), index.lookup([3, 4])) == ({"v": 2}, {})


def test_blocks_elsewhere_are_not_the_engines(index: PrefixIndex) -> None:
    index.apply("v", [stored([1], None, [1, 2], medium="GPU", locality="REMOTE")])
    assert index.num_blocks == 0
    index.apply("v", [stored([1], None, [1, 2], medium="GPU", locality="LOCAL")])
    index.apply("v", [BlockRemoved([1], "GPU", locality="REMOTE")])
    assert index.lookup([1, 2]) == {"v": 2}
    index.apply("v", [BlockRemoved([1], "GPU", locality="LOCAL")])
    assert index.lookup([1, 2]) == {}
