"""The CPU step's numerics class as slow numpy: ``kernels/cpu/native/step/numerics.h``, written again.

Owns a second account of every bit, for whole sequences; float32 in and out. Must not know the native library:
what both say must be equal. Each function takes arrays of any matching shapes.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

SEGMENT = 256
TINY = 2.0**-126
"""Smallest normal float32: what is nearer to zero is zero, when read and when written."""
LOG2E = np.float32(1.44269504)
FINITE = {"bfloat16": np.float32(3.38953139e38), "float32": np.float32(3.40282347e38)}
POLYNOMIAL = (1.32647273e-3, 9.67151299e-3, 5.55073470e-2, 2.40222424e-1, 6.93147004e-1, 1.0)


def _read(values: Any) -> Doubles:
    wide = np.asarray(values, np.float32).astype(np.float64)
    return np.where(np.abs(wide) < TINY, np.copysign(0.0, wide), wide)


def _written(odd: Doubles) -> Floats:
    """Rounded once more, to float32; tiny results are zero, and called tiny after rounding."""
    scaled = np.abs(odd * 2.0**200).astype(np.float32)
    flushed = np.where(scaled < np.float32(2.0**74), 0.0, TINY)
    return np.where(np.abs(odd) < TINY, np.copysign(flushed, odd), odd).astype(np.float32)


def fma(a: Any, b: Any, c: Any) -> Floats:
    """a * b + c, rounded once: exactly in float64, rounded to odd there, and then to float32."""
    with np.errstate(all="ignore"):
        product, addend = np.broadcast_arrays(_read(a) * _read(b), _read(c))  # 48 bits: exact
        total = product + addend
        back = total - product
        error = (product - (total - back)) + (addend - back)
        bits = np.atleast_1d(total).view(np.int64).reshape(total.shape)
        inexact = np.isfinite(total) & (error != 0.0) & (bits % 2 == 0)
        step = np.where((error > 0.0) == (total > 0.0), 1, -1)
        return _written(np.asarray(bits + np.where(inexact, step, 0)).view(np.float64))


def add(a: Any, b: Any) -> Floats:
    return fma(a, np.float32(1.0), b)


def sub(a: Any, b: Any) -> Floats:
    return add(a, -np.asarray(b, np.float32))


def mul(a: Any, b: Any) -> Floats:
    with np.errstate(all="ignore"):
        return _written(_read(a) * _read(b))


def div(a: Any, b: Any) -> Floats:
    """float64 has more than twice the bits and two: rounding twice is rounding once."""
    with np.errstate(all="ignore"):
        return _written(_read(a) / _read(b))


def root(a: Any) -> Floats:
    with np.errstate(all="ignore"):
        return _written(np.sqrt(_read(a)))


def round_bf16(values: Any) -> Floats:
    """To nearest, ties to even, by integers; NaN is one NaN."""
    values = np.atleast_1d(np.asarray(values, np.float32))
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    cut = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32)
    return np.where(np.isnan(values), np.uint32(0x7FC00000), cut).view(np.float32)


def rounded(elem: str, values: Floats) -> Floats:
    return round_bf16(values) if elem == "bfloat16" else np.asarray(values, np.float32)


def exp2(t: Any) -> Floats:
    t, magic = np.atleast_1d(np.asarray(t, np.float32)), np.float32(12582912.0)
    t = np.where(t < np.float32(-126.0), np.float32(-126.0), t)
    n = add(t, magic)
    r = sub(t, sub(n, magic))
    p = np.full(t.shape, POLYNOMIAL[0], np.float32)
    for factor in POLYNOMIAL[1:]:
        p = fma(p, r, np.float32(factor))
    bits = p.view(np.uint32).astype(np.uint64) + (n.view(np.uint32).astype(np.uint64) << 23)
    return (bits & 0xFFFFFFFF).astype(np.uint32).view(np.float32)


def silu(g: Any) -> Floats:
    turned = mul(g, -LOG2E)
    return div(g, add(np.float32(1.0), exp2(np.where(turned > np.float32(126.0), np.float32(126.0), turned))))


def product(recipe: str, c: Any, a: Floats, b: Floats) -> Floats:
    """c + a bᵀ; c: [m, n] or a number, a: [m, k], b: [n, k]. ``cpu1``: blocks of 32 k, in each a chain over
    the even and one over the odd k, from +0. ``cpu2``: one chain through c, of two k the odd one first."""
    padding = ((0, 0), (0, -a.shape[1] % 32))
    a, b = np.pad(a, padding), np.pad(b, padding)
    total = np.broadcast_to(np.asarray(c, np.float32), (len(a), len(b)))
    if recipe == "cpu2":
        for k in range(0, a.shape[1], 2):
            for each in (k + 1, k):
                total = fma(a[:, each, None], b[None, :, each], total)
        return np.asarray(total)
    for block in range(0, a.shape[1], 32):
        even = odd = np.zeros(total.shape, np.float32)
        for k in range(block, block + 32, 2):
            even = fma(a[:, k, None], b[None, :, k], even)
            odd = fma(a[:, k + 1, None], b[None, :, k + 1], odd)
        total = add(total, add(even, odd))
    return np.asarray(total)


def int8(weights: Floats) -> tuple[Floats, Floats]:
    """[n, k] -> whole numbers of at most 127, and a scale for each row; a row that is not finite has none."""
    with np.errstate(all="ignore"):
        scales = np.abs(weights).max(axis=1) / np.float32(127.0)
        scales = np.where(np.isfinite(scales), scales, np.float32(np.nan))
        whole = np.clip(np.rint(weights / scales[:, None]), -127.0, 127.0)
    return np.where((scales > 0.0)[:, None], whole, 0.0).astype(np.float32), scales


def product_int8(recipe: str, c: Floats | None, a: Floats, b: Floats) -> Floats:
    """The product of a and whole numbers, from +0, and then the scales; c: what a sum continues, if any."""
    whole, scales = int8(b)
    total = product(recipe, 0.0, a, whole)
    return mul(total, scales) if c is None else fma(total, scales, c)


def tree(sums: Floats) -> Floats:
    """[..., 16] -> [...]: those 8 apart, then 4, 2, 1."""
    for half in (8, 4, 2, 1):
        sums = add(sums[..., :half], sums[..., half : 2 * half])
    return np.asarray(sums[..., 0])


def normed(x: Floats, weight: Floats, eps: float) -> Floats:
    """x: [..., count]; not yet rounded to the elem."""
    count = x.shape[-1]
    wide = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -count % 16)])
    squares = np.zeros((*x.shape[:-1], 16), np.float32)
    for start in range(0, wide.shape[-1], 16):
        lanes = wide[..., start : start + 16]
        squares = fma(lanes, lanes, squares)
    mean = div(tree(squares), np.float32(count))
    factor = div(np.float32(1.0), root(add(mean, np.float32(eps))))
    return mul(mul(x, factor[..., None]), weight)


def rotated(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """x: [rows, heads, dim]; cos, sin: [rows, dim / 2]."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([fma(-b, sin, mul(a, cos)), fma(a, sin, mul(b, cos))], axis=-1)


def attended(recipe: str, elem: str, q: Floats, k: Floats, v: Floats, scale: float, window: int) -> Floats:
    """One head of a whole sequence; q, k, v: [positions, dim]; window: 0 for none. Not yet rounded."""
    length, dim = q.shape
    factor = mul(np.float32(scale), LOG2E)
    out = np.zeros((length, dim), np.float32)
    top = np.zeros(length, np.float32)
    total = np.zeros(length, np.float32)
    has = np.zeros(length, bool)
    rows = np.arange(length)[:, None]
    for first in range(0, length, SEGMENT):
        at = np.arange(first, min(first + SEGMENT, length))[None, :]
        seen = (at <= rows) & (at > rows - (window or length))
        sees = np.asarray(seen.any(axis=1))
        scores = product(recipe, 0.0, q, k[first : first + SEGMENT])
        m = mul(np.where(seen, scores, -np.inf).max(axis=1), factor)
        shifted = sub(mul(scores, factor), np.where(sees, m, 0.0)[:, None])
        p = np.where(seen, exp2(np.where(seen, shifted, 0.0)), np.float32(0.0))
        p = np.pad(p, ((0, 0), (0, -p.shape[1] % 32)))
        sums = functools.reduce(
            add, np.split(p, p.shape[1] // 16, axis=1), np.zeros((length, 16), np.float32)
        )
        values = np.pad(v[first : first + SEGMENT], ((0, p.shape[1] - at.size), (0, 0)))
        o = add(product(recipe, 0.0, rounded(elem, p), values.T), np.float32(0.0))
        sum_here = tree(sums)
        both = has & sees
        peak = np.where(top > m, top, m)
        old, new = exp2(np.where(both, sub(top, peak), 0.0)), exp2(np.where(both, sub(m, peak), 0.0))
        merged = fma(out, old[:, None], mul(o, new[:, None]))
        out = np.where(both[:, None], merged, np.where(sees[:, None], o, out))
        total = np.where(both, fma(total, old, mul(sum_here, new)), np.where(sees, sum_here, total))
        top = np.where(both, peak, np.where(sees, m, top))
        has |= sees
    return mul(out, div(np.float32(1.0), total)[:, None])
