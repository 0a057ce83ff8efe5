"""Raw rows as numbers, as heads, and as planes of bytes; without torch.

Owns what bits of ``bfloat16``, ``float16`` and ``float32`` mean. Must not know levels nor coders.

Planes: each element turned left by one bit, so that its sign is last and its exponent first, then byte by
byte, the most significant of all elements first. The first plane is bfloat16's and float32's exponent, whole.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from microserve.kvcache.codec.frame import ITEM_NBYTES, Bytes

Floats = npt.NDArray[np.float32]

_WORDS = {2: np.uint16, 4: np.uint32}


def to_heads(rows: Bytes, dtype: str, num_heads: int) -> Floats:
    """rows: [tokens, bytes] -> float32 [heads, tokens, dim]."""
    raw = np.ascontiguousarray(rows)
    if dtype == "bfloat16":
        flat = (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        flat = raw.view("<f4" if dtype == "float32" else "<f2").astype(np.float32)
    return np.ascontiguousarray(flat.reshape(len(rows), num_heads, -1).transpose(1, 0, 2))


def from_heads(heads: Floats, dtype: str, rows: Bytes) -> None:
    """The inverse, into ``rows``; to the nearest of the dtype, ties to even. ``heads``: finite."""
    flat = np.ascontiguousarray(heads.transpose(1, 0, 2).reshape(len(rows), -1))
    if dtype == "bfloat16":
        bits = flat.view(np.uint32)
        odd = bits >> np.uint32(16) & np.uint32(1)
        made = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype("<u2").view(np.uint8)
    elif dtype == "float16":
        made = np.clip(flat, -65504, 65504).astype("<f2").view(np.uint8)
    else:
        made = flat.view(np.uint8)
    rows[...] = made


def to_planes(rows: Bytes, dtype: str) -> Bytes:
    """rows: [tokens, bytes] -> [bytes of an element, elements]."""
    nbytes = ITEM_NBYTES[dtype]
    word = _WORDS[nbytes]
    words = np.ascontiguousarray(rows).reshape(-1).view(word)
    turned = words << word(1) | words >> word(8 * nbytes - 1)
    return np.ascontiguousarray(turned.view(np.uint8).reshape(-1, nbytes)[:, ::-1].T)


def from_planes(planes: Bytes, rows: Bytes) -> None:
    nbytes = len(planes)
    word = _WORDS[nbytes]
    turned = np.ascontiguousarray(planes.T[:, ::-1]).reshape(-1).view(word)
    words = turned >> word(1) | turned << word(8 * nbytes - 1)
    rows[...] = words.view(np.uint8).reshape(rows.shape)
