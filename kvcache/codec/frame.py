"""A payload's header, and how sections behind it are read within bounds.

    64 bytes, little-endian:
     0  magic "MSKV"         12  u16 head dimension        36  u32 bytes of a token's K
     4  u8 version           14  u16 layer                 40  u32 bytes of a token's V
     5  u8 transform         16  u32 tokens                44  u32 nothing yet, 0
     6  u8 quantiser         20  u32 bytes of it all       48  f32 low_ratio
     7  u8 coder             24  u32 seed of the signs     52  u32 nothing yet, 0
     8  u8 dtype             28  u16 levels: K high,       56  u32 crc32 of all behind the header
     9  u8 nothing yet, 0        K low, V high, V low      60  u32 crc32 of the header before it
    10  u16 heads

Owns the header and the error of a payload that is not whole. What stands behind it is codec.py's.
"""

from __future__ import annotations

import struct
import zlib

import msgspec
import numpy as np
import numpy.typing as npt

from microserve.kvcache.codec.profile import CODERS, QUANTISERS, TRANSFORMS, VERSION, Levels, Profile
from microserve.protocol.errors import ConfigError, TransferFailed

MAGIC = b"MSKV"
HEADER_NBYTES = 64
DTYPES = ("float32", "bfloat16", "float16")
ITEM_NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_TENSOR_NBYTES = 1 << 31
"""Of K, or V, of one payload: raw."""

_FORM = struct.Struct("<4s6B3HIII4HIIIfI")

Bytes = npt.NDArray[np.uint8]


class CodecFailed(TransferFailed):
    """The bytes are no payload that may be decoded here; the detail says what is wrong with them."""


class Header(msgspec.Struct, frozen=True):
    """Everything that a decoder is told; equal for equal payloads."""

    profile: Profile
    """Its parameters; the name is empty."""
    dtype: str
    num_heads: int
    head_dim: int
    layer: int
    num_tokens: int
    keys_row_nbytes: int
    values_row_nbytes: int
    seed: int = 0
    nbytes: int = 0
    """Of the whole payload, with header."""
    crc32: int = 0
    """Of what stands behind the header."""
    version: int = VERSION

    @property
    def is_lossy(self) -> bool:
        return self.profile.is_lossy

    @property
    def raw_nbytes(self) -> int:
        return self.num_tokens * (self.keys_row_nbytes + self.values_row_nbytes)


def seal(header: Header, out: Bytes) -> None:
    """Writes the header in front of the body that is in ``out`` already; sizes and crc are taken from there.

    ``out``: exactly the payload."""
    profile = header.profile
    head = _FORM.pack(
        MAGIC,
        VERSION,
        TRANSFORMS.index(profile.transform),
        QUANTISERS.index(profile.quantiser),
        CODERS.index(profile.coder),
        DTYPES.index(header.dtype),
        0,
        header.num_heads,
        header.head_dim,
        header.layer,
        header.num_tokens,
        out.size,
        header.seed,
        *(profile.keys.high, profile.keys.low, profile.values.high, profile.values.low),
        header.keys_row_nbytes,
        header.values_row_nbytes,
        0,
        profile.low_ratio,
        0,
    )
    head += struct.pack("<I", zlib.crc32(out[HEADER_NBYTES:].data))
    head += struct.pack("<I", zlib.crc32(head))
    out[:HEADER_NBYTES] = np.frombuffer(head, np.uint8)


def header(payload: Bytes) -> Header:
    """Of the first ``HEADER_NBYTES`` of a payload; the body is not looked at. Raises :class:`CodecFailed`."""
    if payload.size < HEADER_NBYTES:
        raise CodecFailed(f"a payload of {payload.size} bytes, at least {HEADER_NBYTES}")
    head = payload[:HEADER_NBYTES].tobytes()
    if head[:4] != MAGIC:
        raise CodecFailed("no payload of a codec: its first bytes are others")
    if head[4] != VERSION:
        raise CodecFailed(f"a payload of version {head[4]}, here {VERSION}")
    if zlib.crc32(head[:60]) != int.from_bytes(head[60:], "little"):
        raise CodecFailed("the header's crc32 is another")
    found = _FORM.unpack_from(head)
    transform, quantiser, coder, dtype, spare1 = found[2:7]
    num_heads, head_dim, layer, num_tokens, nbytes, seed = found[7:13]
    keys_high, keys_low, values_high, values_low = found[13:17]
    keys_row_nbytes, values_row_nbytes, spare2, low_ratio, spare3 = found[17:]
    for name, number, known in (
        ("transform", transform, TRANSFORMS),
        ("quantiser", quantiser, QUANTISERS),
        ("coder", coder, CODERS),
        ("dtype", dtype, DTYPES),
    ):
        if number >= len(known):
            raise CodecFailed(f"{name} number {number}, here to {len(known) - 1}")
    if spare1 or spare2 or spare3:
        raise CodecFailed("the header says what is not known here")
    try:
        profile = Profile(
            "",
            transform=TRANSFORMS[transform],
            quantiser=QUANTISERS[quantiser],
            keys=Levels(keys_high, keys_low),
            values=Levels(values_high, values_low),
            low_ratio=low_ratio,
            coder=CODERS[coder],
        )
    except ConfigError as error:
        raise CodecFailed(f"a profile that there is not: {error.detail}") from None
    if nbytes < HEADER_NBYTES or num_tokens < 1 or num_heads < 1 or head_dim < 1:
        raise CodecFailed("the header's sizes are too small")
    if num_tokens * max(keys_row_nbytes, values_row_nbytes) > MAX_TENSOR_NBYTES:
        raise CodecFailed(f"more than {MAX_TENSOR_NBYTES} bytes of K, or of V")
    return Header(
        profile=profile,
        dtype=DTYPES[dtype],
        num_heads=num_heads,
        head_dim=head_dim,
        layer=layer,
        num_tokens=num_tokens,
        keys_row_nbytes=keys_row_nbytes,
        values_row_nbytes=values_row_nbytes,
        seed=seed,
        nbytes=nbytes,
        crc32=int.from_bytes(head[56:60], "little"),
    )


class Reader:
    """Takes sections off a body, front to back; :class:`CodecFailed` where there is too little."""

    def __init__(self, body: Bytes) -> None:
        self._body = body
        self._at = 0

    def take(self, nbytes: int, what: str) -> Bytes:
        left = self._body.size - self._at
        if nbytes > left:
            raise CodecFailed(f"{what}: {nbytes} bytes, and {left} are left")
        self._at += nbytes
        return self._body[self._at - nbytes : self._at]

    def number(self, what: str) -> int:
        """A u32."""
        return int.from_bytes(self.take(4, what).tobytes(), "little")

    def rest(self) -> Bytes:
        return self.take(self._body.size - self._at, "rest")

    def end(self) -> None:
        if self._at != self._body.size:
            raise CodecFailed(f"{self._body.size - self._at} bytes too many")
