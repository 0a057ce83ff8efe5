"""The calls of ``native/module.cc``: one job, one body of a payload.

Owns the job's form and what is behind a fault's number. Must not know headers. Where there is no compiler
there is no native codec: callers compute by numpy.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path

import numpy as np
import numpy.typing as npt

from microserve.kernels.codec.build import SOURCE
from microserve.kernels.host_object import build
from microserve.kernels.kernel_cache import KernelUnavailable

DTYPES = ("float32", "bfloat16", "float16")
CODERS = ("none", "pack", "zstd", "rans")
"""``zstd``: symbols are given to Python, or taken from it."""
FAULTS = {
    -1: "the payload is too short for what its header says",
    -2: "scales of keys: not all are numbers",
    -3: "scales of values: not all are numbers",
    -4: "symbols: one is beyond its levels",
    -5: "table: not 4096 in all, or a symbol beyond its levels",
    -6: "states: too few, or one is below 65536",
    -7: "words: too few, or half of one is left",
    -8: "words: the states do not end where they began",
    -9: "no memory for decoding",
}

Bytes = npt.NDArray[np.uint8]


class Fault(ValueError):
    """The bytes are none that an encoder has made; the text says why."""


class Job(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("dtype", "coder", "num_heads", "head_dim")),
        ("num_tokens", c_int64),
        ("widths", c_int64 * 2),
        ("levels", c_void_p * 2),
        ("signs", c_void_p),
        ("rows", c_void_p * 2),
        ("strides", c_int64 * 2),
        *((name, c_void_p) for name in ("symbols", "body")),
        ("room", c_int64),
    ]


class NativeCodec:
    """Any number of threads may call it."""

    def __init__(self, path: Path, variant: str = "") -> None:
        """``variant``: empty for the best; ``portable``, ``avx2``, ``avx512``.

        Raises ``OSError``, and :class:`KernelUnavailable` where this CPU has it not."""
        loaded = ctypes.CDLL(str(path))
        find, self._work = loaded.ms_codec_variant, loaded.ms_codec_work
        find.argtypes, find.restype = [c_char_p], c_int32
        self._work.argtypes, self._work.restype = [c_int32, c_int32, POINTER(Job)], c_int64
        self._variant = find(variant.encode())
        if self._variant < 0:
            raise KernelUnavailable(f"this CPU cannot run the variant {variant}")

    def encode(
        self,
        rows: Sequence[Bytes],
        dtype: str,
        coder: str,
        levels: Sequence[npt.NDArray[np.int32]] | None,
        signs: npt.NDArray[np.float32] | None,
        symbols: Bytes | None,
        body: Bytes,
    ) -> int | None:
        """K and V of ``rows`` [tokens, bytes] into ``body``; bytes written, None: it does not fit, or levels
        cannot hold it. ``levels``: of K's heads and of V's; None: exact, in planes. ``signs``: [heads, dim].
        ``symbols``: takes them, or first planes, where the coder is ``zstd``."""
        job = _job(rows, dtype, coder, levels, signs, symbols, body)
        told = self._work(self._variant, 0 if levels else 2, job)
        return None if told < 0 else told

    def decode(
        self,
        body: Bytes,
        dtype: str,
        coder: str,
        levels: Sequence[npt.NDArray[np.int32]] | None,
        signs: npt.NDArray[np.float32] | None,
        symbols: Bytes | None,
        rows: Sequence[Bytes],
    ) -> int:
        """The inverse; bytes of ``body`` that were used. Raises :class:`Fault`."""
        job = _job(rows, dtype, coder, levels, signs, symbols, body)
        told = self._work(self._variant, 1 if levels else 3, job)
        if told < 0:
            raise Fault(FAULTS[told])
        return int(told)


def _job(
    rows: Sequence[Bytes],
    dtype: str,
    coder: str,
    levels: Sequence[npt.NDArray[np.int32]] | None,
    signs: npt.NDArray[np.float32] | None,
    symbols: Bytes | None,
    body: Bytes,
) -> Job:
    """Rows have their bytes side by side; all that it points to lives as long as the caller holds it."""
    item = 4 if dtype == "float32" else 2
    widths = [each.shape[1] // item for each in rows]
    heads = len(levels[0]) if levels else 0
    return Job(
        DTYPES.index(dtype),
        CODERS.index(coder),
        heads,
        widths[0] // heads if levels else 0,
        len(rows[0]),
        (c_int64 * 2)(*widths),
        (c_void_p * 2)(*(each.ctypes.data for each in levels or ())),
        None if signs is None else signs.ctypes.data,
        (c_void_p * 2)(*(each.ctypes.data for each in rows)),
        (c_int64 * 2)(*(each.strides[0] for each in rows)),
        None if symbols is None else symbols.ctypes.data,
        body.ctypes.data,
        body.size,
    )


@functools.cache
def native_codec() -> NativeCodec | None:
    """None where it cannot be built or loaded; the first call may compile it, for some seconds."""
    try:
        return NativeCodec(build(SOURCE))
    except (KernelUnavailable, OSError):
        return None
