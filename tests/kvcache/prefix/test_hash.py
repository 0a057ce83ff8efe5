"""Block hashes: the formula is fixed, and a chain grown in pieces is the chain computed at once."""

from __future__ import annotations

import struct
from array import array
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.kvcache.prefix.hash import HashChain, block_hashes, root_hash
from microserve.protocol.errors import ConfigError, InvalidRequest

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=300)
ROOT = root_hash("model")


def test_golden_values() -> None:
    # Engines, index and routers of different versions meet on one mesh: these bytes may never change.
    assert root_hash("model").hex() == "2ecf5e4862082021e26d94b42fe9dd9a"
    assert root_hash("model", adapter="lora", salt="tenant").hex() == "addec964757f2566bc9da6bc9364f0c1"
    assert root_hash("model", revision="r1").hex() == "2bed5017255319d33cb577af75786146"
    assert [h.hex() for h in block_hashes(range(8), 4, ROOT)] == [
        "98ac87b6754ee71dc250252442d5ee50",
        "084f542d699f48b91556e1397e2504c3",
    ]


def test_hash_is_sha256_of_parent_and_little_endian_tokens() -> None:
    first = sha256(ROOT + struct.pack("<4I", 1, 2, 3, 2**32 - 1)).digest()[:16]
    second = sha256(first + struct.pack("<4I", 4, 5, 6, 7)).digest()[:16]
    assert block_hashes([1, 2, 3, 2**32 - 1, 4, 5, 6, 7, 8], 4, ROOT) == [first, second]


def test_roots_do_not_run_fields_together() -> None:
    roots = {
        root_hash("ab"),
        root_hash("a", adapter="b"),
        root_hash("a", salt="b"),
        root_hash("", adapter="a", salt="b"),
        root_hash("", adapter="ab"),
        root_hash("a", revision="b"),
        root_hash("a", salt="b", revision="b"),
        root_hash("a", adapter="b", revision="b"),
    }
    assert len(roots) == 8


def test_root_takes_any_string() -> None:
    assert root_hash("model", salt="\ud800") != root_hash("model", salt="\ud801")


@given(TOKENS, st.integers(1, 20), st.lists(st.integers(0, 300), max_size=6))
def test_chain_in_pieces_equals_all_at_once(tokens: list[int], block_size: int, cuts: list[int]) -> None:
    chain = HashChain(ROOT, block_size)
    for cut in sorted(cuts):
        chain.extend(tokens[:cut])
        assert len(chain.hashes) == min(cut, len(tokens)) // block_size
    chain.extend(array("I", tokens))
    assert chain.hashes == block_hashes(tokens, block_size, ROOT)


@given(TOKENS.filter(bool), st.data())
def test_one_changed_token_changes_every_hash_from_there_on(tokens: list[int], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens[:at], tokens[at] ^ 1, *tokens[at + 1 :]]
    before, after = block_hashes(tokens, 4, ROOT), block_hashes(changed, 4, ROOT)
    assert before[: at // 4] == after[: at // 4]
    assert not set(before[at // 4 :]) & set(after[at // 4 :])


@pytest.mark.parametrize("bad", [-1, 2**32, None, "a", 1.5])
def test_a_token_that_is_not_u32_is_refused(bad: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        block_hashes([1, 2, 3, bad], 4, ROOT)
    assert caught.value.field == "tokens"


def test_block_size_must_be_positive() -> None:
    with pytest.raises(ConfigError) as caught:
        HashChain(ROOT, 0)
    assert caught.value.field == "block_size"
