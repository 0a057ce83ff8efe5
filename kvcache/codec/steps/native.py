"""Bodies by C++ (``kernels/codec/``): the same bytes as body.py's, and the same calls.

Owns what is left to Python there: the mask of heads, and zstd.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from microserve.kernels.codec.native import Fault, NativeCodec
from microserve.kvcache.codec.frame import ITEM_NBYTES, Bytes, CodecFailed, Reader
from microserve.kvcache.codec.steps import body as by_numpy
from microserve.kvcache.codec.steps import coder
from microserve.kvcache.codec.steps.body import Mask, Task


class NativeBody:
    """``put`` and ``take`` as in body.py; any number of threads may call them."""

    def __init__(self, native: NativeCodec) -> None:
        self._native = native

    def put(self, task: Task, is_high: Mask, rows: Sequence[Bytes], out: Bytes) -> int | None:
        profile, is_zstd = task.profile, task.profile.coder == "zstd"
        rows = [_side_by_side(each) for each in rows]
        if not profile.is_lossy and profile.coder == "none":
            return by_numpy.put(task, is_high, rows, out)
        mask = by_numpy.mask_bytes(profile, is_high)
        if mask.size > out.size:
            return None
        out[: mask.size] = mask
        levels = task.levels(is_high) if profile.is_lossy else None
        symbols = np.empty(_num_elements(task, rows), np.uint8) if is_zstd else None
        # Of an exact zstd, planes go behind a frame whose size is not known yet.
        room = out[mask.size :] if levels or not is_zstd else np.empty(_rest_nbytes(task, rows), np.uint8)
        made = self._native.encode(rows, task.dtype, profile.coder, levels, task.signs, symbols, room)
        if made is None or symbols is None:
            return None if made is None else mask.size + made
        frame = np.concatenate(coder.frame(symbols))
        at = mask.size + made if levels else mask.size
        rest = room[:0] if levels else room
        if (nbytes := at + frame.size + rest.size) > out.size:
            return None
        out[at : at + frame.size] = frame
        out[at + frame.size : nbytes] = rest
        return nbytes

    def take(self, task: Task, body: Bytes, rows: Sequence[Bytes]) -> None:
        profile, reader = task.profile, Reader(body)
        if not profile.is_lossy and profile.coder == "none":
            by_numpy.take(task, body, rows)
            return
        into = [_side_by_side(each) for each in rows]
        levels = task.levels(by_numpy.read_mask(reader, task)) if profile.is_lossy else None
        symbols, rest = None, reader.rest()
        if profile.coder == "zstd":
            num_grids = 4 * task.num_heads * task.head_dim if levels else 0
            num_grids += 4 * len(rows[0]) * len(set(levels[1].tolist())) if levels else 0
            inner = Reader(rest)
            grids = inner.take(num_grids, "scales")
            symbols = coder.unframe(inner, _num_elements(task, rows))
            rest = grids if levels else inner.rest()
            if levels:
                inner.end()
        try:
            used = self._native.decode(rest, task.dtype, profile.coder, levels, task.signs, symbols, into)
        except Fault as fault:
            raise CodecFailed(str(fault)) from None
        if used != rest.size:
            raise CodecFailed(f"{rest.size - used} bytes too many")
        for each, made in zip(rows, into, strict=True):
            if made is not each:
                each[...] = made


def _side_by_side(rows: Bytes) -> Bytes:
    """A row's bytes; rows may lie anywhere."""
    return rows if rows.strides[1] == 1 or not rows.size else np.ascontiguousarray(rows)


def _num_elements(task: Task, rows: Sequence[Bytes]) -> int:
    return sum(each.size for each in rows) // ITEM_NBYTES[task.dtype]


def _rest_nbytes(task: Task, rows: Sequence[Bytes]) -> int:
    """Of all planes but the first."""
    return _num_elements(task, rows) * (ITEM_NBYTES[task.dtype] - 1)
