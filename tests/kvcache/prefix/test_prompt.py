"""Hashes of prompts: what is remembered is what hashing gives, and memory has a bound."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.kvcache.prefix.hash import block_hashes, root_hash
from microserve.kvcache.prefix.prompt import PromptHashes
from microserve.protocol.errors import InvalidRequest

ROOT = root_hash("model")
OTHER_ROOT = root_hash("model", salt="tenant")


def read(prompts: PromptHashes, tokens: list[int], block_size: int, root: bytes = ROOT) -> list[bytes]:
    """All runs of a prompt, each remembered, as an index reads them."""
    full = len(tokens) - len(tokens) % block_size
    hashes: list[bytes] = []
    begin, before = 0, root
    while begin < full:
        end = min(full, begin + min(begin or block_size, prompts.max_run_tokens))
        name, run = prompts.run(before, tokens[begin:end])
        prompts.remember(name, run)
        hashes += run
        begin, before = end, run[-1]
    return hashes


# Two tokens and few lengths: prompts share beginnings of every length.
PROMPTS = st.lists(st.lists(st.integers(0, 1), max_size=80), min_size=1, max_size=8)


@given(PROMPTS, st.integers(1, 4), st.sampled_from([0, 700, 1 << 20]))
def test_whatever_was_read_before_a_prompt_has_its_own_hashes(
    prompts: list[list[int]], block_size: int, max_nbytes: int
) -> None:
    memory = PromptHashes(block_size, max_nbytes)
    for tokens in prompts:
        for root in (ROOT, OTHER_ROOT):
            assert read(memory, tokens, block_size, root) == block_hashes(tokens, block_size, root)


def test_a_beginning_is_hashed_once() -> None:
    memory = PromptHashes(2, 1 << 20)
    first = read(memory, [*range(64)], 2)
    nbytes = memory.nbytes
    assert read(memory, [*range(64)], 2) == first
    assert memory.nbytes == nbytes
    # The last run is another one: its two blocks differ.
    read(memory, [*range(32), *range(32)], 2)
    assert nbytes < memory.nbytes < 2 * nbytes


def test_memory_has_a_bound_and_goes_on_remembering() -> None:
    memory = PromptHashes(2, 10_000)
    for number in range(200):
        read(memory, [number, *range(63)], 2)
        assert 0 < memory.nbytes <= 10_000


def test_what_never_fits_is_not_kept() -> None:
    memory = PromptHashes(2, 100)
    assert read(memory, [*range(64)], 2) == block_hashes([*range(64)], 2, ROOT)
    assert memory.nbytes == 0


@pytest.mark.parametrize("bad", [-1, 2**32, None, "a", 1.5])
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_a_token_that_is_not_u32_is_refused(bad: int, num_tokens: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        PromptHashes(1, 0).run(ROOT, [bad, 1][:num_tokens])
    assert caught.value.field == "tokens"
