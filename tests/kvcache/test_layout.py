from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.kvcache.grant.checksum import extend_checksum
from microserve.kvcache.heap.local import MemoryHeap, MemoryRegistry
from microserve.kvcache.layout import K, KvLayout, V, block_spans
from microserve.kvcache.words import (
    MAX_GENERATION,
    POISON,
    WordLayout,
    count_of,
    grant_tag,
    pack_count,
    pack_state,
)
from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.kv.grant import MAX_LANES

LAYOUT = KvLayout("m", 3, 5, 4, 2, 8, "float16")


def test_every_row_has_its_own_bytes_and_they_fill_the_region() -> None:
    starts = [
        LAYOUT.offset(layer, block, kv, row)
        for layer, block, kv, row in itertools.product(range(3), range(5), (K, V), range(4))
    ]

    assert starts == list(range(0, LAYOUT.data_nbytes, LAYOUT.row_nbytes))


def test_sizes() -> None:
    assert LAYOUT.row_nbytes == 2 * 8 * 2
    assert LAYOUT.half_nbytes == 4 * LAYOUT.row_nbytes
    assert LAYOUT.block_nbytes == 2 * LAYOUT.half_nbytes
    assert LAYOUT.layer_nbytes == 5 * LAYOUT.block_nbytes
    assert LAYOUT.data_nbytes == 3 * LAYOUT.layer_nbytes


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_num_blocks_for(num_tokens: int, num_blocks: int) -> None:
    assert LAYOUT.num_blocks_for(num_tokens) == num_blocks


@pytest.mark.parametrize(("state_nbytes", "num_blocks"), [(0, 0), (1, 1), (256, 1), (257, 2)])
def test_a_state_takes_whole_blocks_of_its_own(state_nbytes: int, num_blocks: int) -> None:
    layout = msgspec.structs.replace(LAYOUT, state_nbytes=state_nbytes)
    assert layout.num_state_blocks == num_blocks
    assert layout.num_grant_blocks(4, 9) == 2 + num_blocks
    assert layout.num_grant_blocks(8, 8) == 0  # nothing is to be sent
    assert bool(layout.geometry.layers) is bool(state_nbytes)
    assert (layout.layout_hash == LAYOUT.layout_hash) is not bool(state_nbytes)


def test_whole_blocks_of_another_order_have_no_state() -> None:
    with pytest.raises(ConfigError, match="state_nbytes"):
        msgspec.structs.replace(LAYOUT, order="another", state_nbytes=1)


def test_pools_of_different_size_may_exchange_kv() -> None:
    assert LAYOUT.layout_hash == msgspec.structs.replace(LAYOUT, num_blocks=99).layout_hash


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"num_layers": 4},
        {"block_size": 8},
        {"num_kv_heads": 1},
        {"head_dim": 16},
        {"dtype": "bfloat16"},
        {"revision": "other weights"},
        {"order": "another"},
        {"state_nbytes": 64},
    ],
)
def test_anything_else_changes_the_hash(change: dict[str, object]) -> None:
    assert LAYOUT.layout_hash != msgspec.structs.replace(LAYOUT, **change).layout_hash


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 0},
        {"num_blocks": 0},
        {"block_size": 0},
        {"num_kv_heads": 0},
        {"head_dim": -1},
        {"dtype": "int8"},
        {"order": ""},
        {"state_nbytes": -1},
        {"num_blocks": 1 << 30},
    ],
)
def test_a_field_out_of_bounds_is_named(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        msgspec.structs.replace(LAYOUT, **change)

    assert caught.value.field == next(iter(change))


@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 20), st.integers(0, 20))
def test_block_spans_name_each_token_once_in_order(size: int, skipped: int, skip: int, length: int) -> None:
    origin = skipped * size
    lo, hi = origin + skip, origin + skip + length
    blocks = list(range(100, 200))

    rows = [
        (block, first + index)
        for block, first, num_rows in block_spans(blocks, origin, lo, hi, size)
        for index in range(num_rows)
    ]

    assert rows == [(blocks[(token - origin) // size], token % size) for token in range(lo, hi)]


def test_words_do_not_overlap_and_fill_no_more_than_the_region() -> None:
    words = WordLayout(num_slots=3, num_layers=5, num_blocks=7)

    indices = [words.state(slot) for slot in range(3)]
    for slot, lane in itertools.product(range(3), range(MAX_LANES)):
        indices += [
            words.claim(slot, lane),
            words.writer(slot, lane),
            words.begin(slot, lane),
            words.end(slot, lane),
            words.first_token(slot, lane),
            *words.arrivals(slot, lane).tolist(),
            *(words.checksum(slot, lane, layer) for layer in range(5)),
        ]
    for layer in range(5):
        indices += words.tags(layer, range(7)).tolist()

    assert len(set(indices)) == len(indices)
    assert 0 <= min(indices) <= max(indices) == words.num_words - 1


def test_lanes_do_not_share_cache_lines() -> None:
    words = WordLayout(num_slots=2, num_layers=3, num_blocks=1)

    lines = [
        {words.claim(slot, lane) // 8, words.checksum(slot, lane, 2) // 8}
        for slot, lane in itertools.product(range(2), range(MAX_LANES))
    ]

    assert all(one.isdisjoint(other) for one, other in itertools.combinations(lines, 2))


def test_a_heap_needs_a_slot() -> None:
    with pytest.raises(ConfigError) as caught:
        WordLayout(num_slots=0, num_layers=1, num_blocks=1)

    assert caught.value.field == "num_slots"


@given(st.integers(1, MAX_GENERATION), st.integers(0, (1 << 32) - 1), st.booleans())
def test_counts_are_read_back_only_under_their_generation(
    generation: int, count: int, poisoned: bool
) -> None:
    word = pack_count(generation, count) | (POISON if poisoned else 0)

    assert 0 <= word < 1 << 64
    assert count_of(word, generation) == count
    assert count_of(word, generation + 1) is None
    assert pack_count(generation, 0) < POISON


def test_later_words_are_greater() -> None:
    assert pack_state(1, 2) < pack_state(2, 1)
    assert pack_count(1, 5) < pack_count(1, 6) < POISON | pack_count(1, 6)


def test_tags_tell_grants_apart() -> None:
    tags = {grant_tag(*name) for name in itertools.product((1, 2, 11), (1, 2, 11), (1, 2, 11))}

    assert len(tags) == 27
    assert all(0 < tag < 1 << 64 for tag in tags)


def test_a_checksum_does_not_depend_on_where_it_was_interrupted() -> None:
    heap = MemoryHeap(LAYOUT, incarnation=1, registry=MemoryRegistry())
    heap.data[:] = np.frombuffer(np.random.default_rng(1).bytes(LAYOUT.data_nbytes), np.uint8)

    def over(*cuts: int) -> int:
        checksum = 0
        for lo, hi in itertools.pairwise(cuts):
            spans = block_spans([4, 0, 2], 0, lo, hi, 4)
            checksum = extend_checksum(checksum, heap, 1, spans)
        return checksum

    assert over(1, 11) == over(1, 2, 7, 11)
    assert over(1, 11) != over(1, 10)
