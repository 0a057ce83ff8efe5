"""What stands behind a payload's header, made and read by numpy.

quantised    the mask of high heads, a bit each, lowest first (mixed quantisers only)
             least and scale of the keys' channels, of the values' tokens (quantiser.py), float16
             symbols, a byte each, heads outermost: K, then V; or as the coder has them:
             pack    K's heads, V's heads
             rans    for K, then V: u32 bytes of a stream, the stream
             zstd    u32 bytes of a frame, the frame of K's symbols and V's
exact        ``none``: the rows of K, the rows of V
             else first planes as symbols are coded above, then K's other planes and V's
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from microserve.kvcache.codec.frame import ITEM_NBYTES, Bytes, CodecFailed, Reader
from microserve.kvcache.codec.profile import Profile
from microserve.kvcache.codec.steps import coder, planes, quantiser, transform

Mask = npt.NDArray[np.bool_]
ONE_GROUP = ((256,), (256,))
"""Bytes of K, and of V, with a table for all."""


@dataclass(frozen=True, slots=True)
class Task:
    """Of one body: what is not in its bytes."""

    profile: Profile
    dtype: str
    num_heads: int
    head_dim: int
    layer: int
    seed: int

    def levels(self, is_high: Mask) -> list[quantiser.Counts]:
        """Of the heads: for keys, for values."""
        both = (self.profile.keys, self.profile.values)
        return [np.where(is_high, each.high, each.low).astype(np.int32) for each in both]

    @property
    def signs(self) -> transform.Floats | None:
        if self.profile.transform == "none":
            return None
        return transform.signs(self.seed, self.layer, self.num_heads, self.head_dim)


def put(task: Task, is_high: Mask, rows: Sequence[Bytes], out: Bytes) -> int | None:
    """K and V of ``rows`` [tokens, bytes] into ``out``; bytes written, None: they do not fit, or levels
    cannot hold such numbers."""
    parts = _quantised(task, is_high, rows) if task.profile.is_lossy else _exact(task, rows)
    if parts is None or (nbytes := sum(part.size for part in parts)) > out.size:
        return None
    np.concatenate(parts, out=out[:nbytes])
    return nbytes


def take(task: Task, body: Bytes, rows: Sequence[Bytes]) -> None:
    """The inverse, of all of ``body``. Raises :class:`CodecFailed`."""
    reader = Reader(body)
    if task.profile.is_lossy:
        _restore(task, reader, rows)
    else:
        _copy_back(task, reader, rows)
    reader.end()


def mask_bytes(profile: Profile, is_high: Mask) -> Bytes:
    return np.packbits(is_high, bitorder="little") if profile.is_mixed else np.empty(0, np.uint8)


def read_mask(reader: Reader, task: Task) -> Mask:
    """Raises :class:`CodecFailed`."""
    if not task.profile.is_mixed:
        return np.ones(task.num_heads, np.bool_)
    mask = np.unpackbits(reader.take(-(-task.num_heads // 8), "mask of heads"), bitorder="little")
    if mask[task.num_heads :].any():
        raise CodecFailed("mask of heads: a head too many")
    return mask[: task.num_heads].astype(np.bool_)


def _quantised(task: Task, is_high: Mask, rows: Sequence[Bytes]) -> list[Bytes] | None:
    k, v = (planes.to_heads(each, task.dtype, task.num_heads) for each in rows)
    if not (quantiser.is_within(k) and quantiser.is_within(v)):
        return None
    if (signs := task.signs) is not None:
        k, v = transform.rotate(k, signs), transform.rotate(v, signs)
    levels = task.levels(is_high)
    made_k, made_v = quantiser.quantise_keys(k, levels[0]), quantiser.quantise_values(v, levels[1])
    if made_k is None or made_v is None:
        return None
    grids = [grid.astype("<f2").view(np.uint8).reshape(-1) for grid in (made_k[0], made_v[0])]
    symbols = [made.reshape(len(is_high), -1) for made in (made_k[1], made_v[1])]
    coded = coder.encode(task.profile.coder, symbols, [each.tolist() for each in levels])
    return [mask_bytes(task.profile, is_high), *grids, *coded]


def _restore(task: Task, reader: Reader, rows: Sequence[Bytes]) -> None:
    num_tokens = len(rows[0])
    shape = (task.num_heads, num_tokens, task.head_dim)
    levels = task.levels(read_mask(reader, task))
    grid_k = quantiser.read_grid(reader, (2, task.num_heads, task.head_dim), "scales of keys")
    grid_v = quantiser.read_grid(
        reader, (len(quantiser.groups(levels[1])), 2, num_tokens), "scales of values"
    )
    count = num_tokens * task.head_dim
    symbols = coder.decode(task.profile.coder, reader, [each.tolist() for each in levels], (count, count))
    for each, of in zip(symbols, levels, strict=True):
        if (each >= of[:, None]).any():
            raise CodecFailed("symbols: one is beyond its levels")
    k = quantiser.restore_keys(symbols[0].reshape(shape), grid_k)
    v = quantiser.restore_values(symbols[1].reshape(shape), grid_v, levels[1])
    if (signs := task.signs) is not None:
        k, v = transform.rotate_back(k, signs), transform.rotate_back(v, signs)
    planes.from_heads(k, task.dtype, rows[0])
    planes.from_heads(v, task.dtype, rows[1])


def _exact(task: Task, rows: Sequence[Bytes]) -> list[Bytes]:
    if task.profile.coder == "none":
        return [np.ascontiguousarray(each).reshape(-1) for each in rows]
    made = [planes.to_planes(each, task.dtype) for each in rows]
    rest = [each[1:].reshape(-1) for each in made]
    return coder.encode(task.profile.coder, [each[:1] for each in made], ONE_GROUP) + rest


def _copy_back(task: Task, reader: Reader, rows: Sequence[Bytes]) -> None:
    if task.profile.coder == "none":
        for each in rows:
            each[...] = reader.take(each.size, "rows").reshape(each.shape)
        return
    nbytes = ITEM_NBYTES[task.dtype]
    counts = (rows[0].size // nbytes, rows[1].size // nbytes)
    first = coder.decode(task.profile.coder, reader, ONE_GROUP, counts)
    for each, plane, count in zip(rows, first, counts, strict=True):
        rest = reader.take((nbytes - 1) * count, "planes").reshape(nbytes - 1, count)
        planes.from_planes(np.concatenate((plane.reshape(1, -1), rest)), each)
