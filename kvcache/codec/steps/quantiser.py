"""Floats to a few levels between least and greatest of a group, and back.

    scale = (greatest - least) / (levels - 1)
    q = floor((x - least) / scale + 1/2)        x' = q * scale + least

Least and scale are kept as float16, least rounded down and scale up, and q is made of the rounded ones: so
|x - x'| <= scale / 2 whatever they are. A group of keys is a channel over all tokens; a group of values is a
token over the channels of all heads of the same levels.

Owns this arithmetic and the order of what is kept. Must not know dtypes, coders nor which heads are low.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from microserve.kvcache.codec.frame import CodecFailed, Reader

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Symbols = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int32]
"""Levels of each head."""

GREATEST = np.float32(65504)
"""Of float16. KV beyond it, or that is no number, is not quantised: it goes as it is."""


def quantise_keys(heads: Floats, levels: Counts) -> tuple[Halves, Symbols] | None:
    """heads: [heads, tokens, dim] -> least and scale [2, heads, dim], symbols [heads, tokens, dim]."""
    found = _grid(heads.min(axis=1), heads.max(axis=1), levels[:, None])
    if found is None:
        return None
    return found, _symbols(heads, found[0][:, None, :], found[1][:, None, :], levels[:, None, None])


def restore_keys(symbols: Symbols, kept: Halves) -> Floats:
    """The inverse: float32 [heads, tokens, dim]."""
    least, scale = kept.astype(np.float32)
    restored: Floats = symbols.astype(np.float32) * scale[:, None, :] + least[:, None, :]
    return restored


def quantise_values(heads: Floats, levels: Counts) -> tuple[Halves, Symbols] | None:
    """heads: [heads, tokens, dim] -> least and scale [groups, 2, tokens], symbols [heads, tokens, dim].

    Groups: the heads of the most levels, and the others where there are any."""
    grids, symbols = [], np.empty(heads.shape, np.uint8)
    for members in groups(levels):
        count = levels[members][0]
        some = heads[members]
        found = _grid(some.min(axis=(0, 2)), some.max(axis=(0, 2)), count)
        if found is None:
            return None
        grids.append(found)
        symbols[members] = _symbols(some, found[0][None, :, None], found[1][None, :, None], count)
    return np.stack(grids), symbols


def restore_values(symbols: Symbols, kept: Halves, levels: Counts) -> Floats:
    made = np.empty(symbols.shape, np.float32)
    for members, (least, scale) in zip(groups(levels), kept.astype(np.float32), strict=True):
        made[members] = symbols[members].astype(np.float32) * scale[None, :, None] + least[None, :, None]
    return made


def groups(levels: Counts) -> list[npt.NDArray[np.bool_]]:
    """Which heads share a grid of values: masks, the most levels first."""
    return [levels == count for count in sorted(set(levels.tolist()), reverse=True)]


def is_within(heads: Floats) -> bool:
    """All are numbers that float16 reaches."""
    return bool((np.abs(heads) <= GREATEST).all())


def read_grid(reader: Reader, shape: tuple[int, ...], what: str) -> Halves:
    """Of least and scale; raises :class:`CodecFailed` where one is no number."""
    count = int(np.prod(shape))
    found = reader.take(2 * count, what).view("<f2") if count else np.empty(0, np.float16)
    if not np.isfinite(found).all():
        raise CodecFailed(f"{what}: not all are numbers")
    return found.reshape(shape).astype(np.float16)


def _grid(least: Floats, greatest: Floats, levels: int | Counts) -> Halves | None:
    """[2, ...]: least rounded down, scale rounded up; None where float16 does not reach."""
    least, greatest = least + np.float32(0), greatest + np.float32(0)  # there are two zeros
    with np.errstate(over="ignore"):
        down = _rounded(least, -1)
        scale = _rounded((greatest - down.astype(np.float32)) / np.float32(np.asarray(levels) - 1), 1)
    both = np.stack((down, scale))
    return both if np.isfinite(both).all() else None


def _rounded(number: Floats, towards: int) -> Halves:
    """To the next float16 below (-1) or above (1), where it is none itself."""
    nearest = number.astype(np.float16)
    back = nearest.astype(np.float32)
    is_past = back > number if towards < 0 else back < number
    return np.where(is_past, np.nextafter(nearest, np.float16(towards * np.inf)), nearest)


def _symbols(heads: Floats, least: Halves, scale: Halves, levels: int | Counts) -> Symbols:
    wide = scale.astype(np.float32)
    inverse = np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide > 0)
    steps = (heads - least.astype(np.float32)) * inverse + np.float32(0.5)
    symbols: Symbols = np.minimum(steps.astype(np.int32), np.asarray(levels) - 1).astype(np.uint8)
    return symbols
