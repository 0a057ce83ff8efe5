"""Hadamard's rotation of heads, with random signs: outliers of one channel become a little of every channel.

    y = H (x * signs) / sqrt(n)          x = signs * (H y / sqrt(n))

A head dimension that is no power of two is rotated in parts, the largest first: 96 as 64 and 32.
Owns the order of the sums, which C++ has too, so that bits are equal. Must not know levels nor bytes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

SEED = 0x4D534B56


def parts(head_dim: int) -> list[int]:
    """Descending powers of two that sum to it."""
    return [1 << bit for bit in reversed(range(head_dim.bit_length())) if head_dim >> bit & 1]


@lru_cache(maxsize=256)
def signs(seed: int, layer: int, num_heads: int, head_dim: int) -> Floats:
    """[heads, head_dim] of 1 and -1: the top bit of splitmix64 of ``seed << 32 | layer << 16 | head``, and of
    the channel. Read-only."""
    head = np.arange(num_heads, dtype=np.uint64)[:, None]
    start = np.uint64(seed) << np.uint64(32) | np.uint64(layer) << np.uint64(16) | head
    mixed = _splitmix(_splitmix(start) + np.arange(head_dim, dtype=np.uint64)[None, :])
    made = np.where(mixed >> np.uint64(63) == 1, np.float32(-1), np.float32(1))
    made.setflags(write=False)
    return made


def _splitmix(number: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Numbers that look random, of numbers; products wrap."""
    number = number + np.uint64(0x9E3779B97F4A7C15)
    number = (number ^ number >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ number >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return number ^ number >> np.uint64(31)


def rotate(heads: Floats, of: Floats) -> Floats:
    """heads: [heads, tokens, head_dim]; of: signs [heads, head_dim]."""
    return _walsh(heads * of[:, None, :])


def rotate_back(heads: Floats, of: Floats) -> Floats:
    return _walsh(heads) * of[:, None, :]


def _walsh(heads: Floats) -> Floats:
    """The last dimension times Hadamard's matrix over the root of its size, part by part. Sums are of
    neighbours at distance 1, 2, 4 and so on."""
    made = np.empty_like(heads)
    begin = 0
    for size in parts(heads.shape[-1]):
        part = heads[..., begin : begin + size]
        step = 1
        while step < size:
            pairs = part.reshape(*part.shape[:-1], size // (2 * step), 2, step)
            one, other = pairs[..., 0, :], pairs[..., 1, :]
            part = np.stack((one + other, one - other), axis=-2).reshape(*heads.shape[:-1], size)
            step *= 2
        made[..., begin : begin + size] = part * np.float32(1 / np.sqrt(np.float64(size)))
        begin += size
    return made
