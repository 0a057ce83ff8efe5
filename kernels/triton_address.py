"""Where a row of a paged layer lies, for every Triton kernel.

    kv[block][K=0 | V=1][row][kv_head][head_dim]

Owns that arithmetic. Must not know what the kernels do with the rows. Needs Triton to be imported.
"""

# Triton publishes no types, and a kernel's arguments are not Python values.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

TILE_VALUES = 2048
"""Of one program over (token, head) pairs: pairs times their padded length."""


@triton.jit
def key_row(block, row, BLOCK_SIZE: tl.constexpr):
    """Index of a key's row among all rows of the layer; its value is BLOCK_SIZE rows further on."""
    return block * (2 * BLOCK_SIZE) + row


@triton.jit
def paired_rows(
    slots,
    half,
    num_tokens,
    num_slots,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """(pairs, tokens, heads, held, places), int64 [ROWS] each, of this program's (token, head) pairs.

    held: the token has a slot within [0, num_slots); places: of the pair's K (half 0) or V (half 1) among
    the layer's (row, head) pairs, to be used where held.
    """
    pairs = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tokens = pairs // NUM_HEADS
    heads = pairs % NUM_HEADS
    slot = tl.load(slots + tokens, mask=tokens < num_tokens, other=-1)
    held = (slot >= 0) & (slot < num_slots)
    row = key_row(slot // BLOCK_SIZE, half * BLOCK_SIZE + slot % BLOCK_SIZE, BLOCK_SIZE)
    return pairs, tokens, heads, held, row * NUM_HEADS + heads


def pair_tile(head_dim: int) -> tuple[int, int]:
    """(padded head_dim, pairs of a program)."""
    dim = triton.next_power_of_2(head_dim)
    return dim, max(1, TILE_VALUES // dim)
