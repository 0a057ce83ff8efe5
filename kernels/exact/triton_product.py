"""Matrix products in Triton, for any number of rows by one kernel: x [rows, ins] times weight [outs, ins].

A row's result is one sum along ``ins`` from its first value to its last, in tiles of the same depth, whatever
the other rows: a library takes another kernel, or another split of that sum, for another number of rows.
The tile is high enough to use matrix units in a prefill and low enough that a decode step still waits for
memory: a multiplication of rows that are not there costs less than the weights' way into the chip.

Owns the kernel, its tiles and its launch. Must not know models. Needs Triton to be imported.
"""

# Triton publishes no types, and a kernel's arguments are not Python values.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from microserve.kernels.exact.launch import OPTIONS, in_place


class ProductTiles(NamedTuple):
    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


TILES = {
    4: ProductTiles(16, 64, 32, 4, 2),  # no matrix units at full precision: small tiles keep the code short
    2: ProductTiles(64, 64, 128, 4, 3),
}
"""By the bytes of a value; another tile is another numerics class."""


@triton.jit(do_not_specialize=["num_rows"])
def product_kernel(
    x,
    weight,
    bias,
    out,
    num_rows,
    OUTS: tl.constexpr,
    INS: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of the result; programs side by side read the same columns of the weights."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    has_row = (rows < num_rows)[:, None]
    has_column = (columns < OUTS)[None, :]
    left = x + rows.to(tl.int64)[:, None] * INS
    right = weight + columns.to(tl.int64)[None, :] * INS
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, INS, DEPTH):
        places = start + depth
        a = tl.load(left + places[None, :], mask=has_row & (places < INS)[None, :], other=0.0)
        b = tl.load(right + places[:, None], mask=has_column & (places < INS)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    if BIASED:
        total += tl.load(bias + columns, mask=columns < OUTS, other=0.0).to(tl.float32)[None, :]
    places = out + rows.to(tl.int64)[:, None] * OUTS + columns[None, :]
    tl.store(places, total.to(out.dtype.element_ty), mask=has_row & has_column)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., ins] times weight [outs, ins], plus bias [outs]; of one dtype, fp32, fp16 or bf16, added up in
    fp32. Launched on the current device."""
    outs, ins = weight.shape
    given, tiles = in_place(x.reshape(-1, ins)), TILES[x.element_size()]
    out = torch.empty(given.shape[0], outs, dtype=x.dtype, device=x.device)
    if given.shape[0]:
        grid = (triton.cdiv(given.shape[0], tiles.rows), triton.cdiv(outs, tiles.columns))
        product_kernel[grid](
            *(given, in_place(weight), weight if bias is None else in_place(bias), out, given.shape[0]),
            *(outs, ins, bias is not None, tiles.rows, tiles.columns, tiles.depth),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            **OPTIONS,
        )
    return out.view(*x.shape[:-1], outs)
