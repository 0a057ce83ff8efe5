"""The numbers that decide tokens: what they are defined as, and that they never change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from microserve.kernels.philox import uniform_rows, uniforms

MASK = 2**64 - 1


def philox_4x64(key: int, counter: int, high: int) -> int:
    """First word of Philox4x64-10 (Salmon et al., SC'11); ``high`` is the counter's third word."""
    c0, c1, c2, c3 = counter, 0, high, 0
    k0, k1 = key, 0
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c0, 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * c2, 2**64)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return c0


@given(seed=st.integers(0, 2**63 - 1), position=st.integers(0, 2**40), block=st.integers(0, 50))
def test_uniforms_are_the_documented_function(seed: int, position: int, block: int) -> None:
    word = philox_4x64(seed, block + 1, position)
    assert uniforms(seed, position, 4 * block + 1)[-1] == ((word >> 12) + 0.5) / 2**52


@pytest.mark.parametrize(
    ("seed", "position", "numbers"),
    [
        (0, 0, [0.011546754286331562, 0.24154919656271823]),
        (0, 1, [0.6436367332217984, 0.06352798769864865]),
        (1, 0, [0.3035680343067587, 0.8487087496857769]),
        (42, 7, [0.17180808711771622, 0.16797315877983]),
        (2**63 - 1, 131071, [0.8362557738281312, 0.5905187213012341]),
    ],
)
def test_golden_numbers(seed: int, position: int, numbers: list[float]) -> None:
    """If these change, a request that moves between an old and a new engine changes its text."""
    assert uniforms(seed, position, 2).tolist() == numbers


def test_rows_are_the_single_ones() -> None:
    seeds, positions = torch.tensor([5, 2**63 - 1]), torch.tensor([0, 77])
    rows = uniform_rows(seeds, positions, 9)
    assert rows.tolist() == [uniforms(5, 0, 9).tolist(), uniforms(2**63 - 1, 77, 9).tolist()]
    assert uniform_rows(seeds[:0], positions[:0], 9).shape == (0, 9)


@pytest.mark.parametrize(
    ("seeds", "positions", "message"),
    [
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), "seeds is torch.float32"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), r"positions is .* \(3,\)"),
        (torch.zeros(4, dtype=torch.int64)[::2], torch.zeros(2, dtype=torch.int64), "seeds .* contiguous"),
        (
            torch.zeros(2, dtype=torch.int64),
            torch.zeros(2, dtype=torch.int64, device="meta"),
            "positions is on meta",
        ),
    ],
)
def test_wrong_arguments_are_named(seeds: torch.Tensor, positions: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        uniform_rows(seeds, positions, 4)
