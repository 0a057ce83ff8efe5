"""Philox4x64-10 in Triton: four words a counter, a tile of counters a program.

Owns the kernel and its launch; ``philox.py`` says what it means and checks the arguments. Needs Triton to be
imported.
"""

# Triton publishes no types, and a kernel's arguments are not Python values.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = 256
"""Counters of one program: a quarter as many as words."""


@triton.jit(do_not_specialize=["count"])
def uniform_kernel(seeds, positions, out, count, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    counters = tl.program_id(1) * TILE + tl.arange(0, TILE)
    seed = tl.load(seeds + row).to(tl.uint64, bitcast=True)
    position = tl.load(positions + row).to(tl.uint64, bitcast=True)
    none = tl.zeros([TILE], tl.uint64)
    word0, word1, word2, word3 = (counters + 1).to(tl.uint64), none, none + position, none
    key0, key1 = none + seed, none
    first = none + 0xD2E7470EE14C6C93
    second = none + 0xCA5A826395121157
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(word0, first), word0 * first
        high2, low2 = tl.umulhi(word2, second), word2 * second
        word0, word1, word2, word3 = high2 ^ word1 ^ key0, low2, high0 ^ word3 ^ key1, low0
        key0 += 0x9E3779B97F4A7C15
        key1 += 0xBB67AE8584CAA73B
    places = out + row * count + counters * 4
    _store(places, word0, counters * 4, count)
    _store(places + 1, word1, counters * 4 + 1, count)
    _store(places + 2, word2, counters * 4 + 2, count)
    _store(places + 3, word3, counters * 4 + 3, count)


@triton.jit
def _store(places, words, tokens, count):
    # Both constants are powers of two and the sum has 53 bits: exact.
    numbers = ((words >> 12).to(tl.int64).to(tl.float64) + 0.5) * 2.220446049250313e-16
    tl.store(places, numbers, mask=tokens < count)


def launch(seeds: Tensor, positions: Tensor, out: Tensor) -> None:
    """For arguments that :func:`~microserve.kernels.philox.uniform_rows` has checked; out: [rows, count]."""
    num_rows, count = out.shape
    if num_rows and count:
        grid = (num_rows, triton.cdiv(count, 4 * TILE))
        uniform_kernel[grid](seeds, positions, out, count, TILE=TILE, num_warps=4)
