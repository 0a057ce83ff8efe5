"""Symbols into a payload's last sections, by the coder's name, and back within bounds."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from microserve.kvcache.codec.frame import Bytes, CodecFailed, Reader
from microserve.kvcache.codec.profile import CODERS, VERSION
from microserve.kvcache.codec.steps import pack, rans

try:
    import zstandard
except ImportError:  # an environment of somebody else's
    HAS_ZSTD = False
else:
    HAS_ZSTD = True

SUPPORTED = tuple(f"kv{VERSION}:{name}" for name in CODERS if HAS_ZSTD or name != "zstd")
"""What is decoded here: a receiver says it with its grants, and ``Profile.needs`` must be in it."""
ZSTD_LEVEL = 1
"""Higher ones find hardly more in symbols, and take several times as long."""

Levels = Sequence[Sequence[int]]
"""Of the groups of keys, and of those of values."""


class _Zstd(threading.local):
    """Contexts serve one thread at a time. Each is made when it is first used: so never where there is no
    zstandard."""

    @cached_property
    def compressor(self) -> zstandard.ZstdCompressor:
        return zstandard.ZstdCompressor(level=ZSTD_LEVEL)

    @cached_property
    def decompressor(self) -> zstandard.ZstdDecompressor:
        return zstandard.ZstdDecompressor()


_zstd = _Zstd()


def encode(name: str, symbols: Sequence[Bytes], levels: Levels) -> list[Bytes]:
    """symbols: of keys, of values, each [groups, elements]."""
    if name == "pack":
        return [part for each, of in zip(symbols, levels, strict=True) for part in pack.pack(each, of)]
    if name == "zstd":
        return frame(np.concatenate([each.reshape(-1) for each in symbols]))
    if name == "rans":
        parts = []
        for each, of in zip(symbols, levels, strict=True):
            if each.size:
                stream = rans.encode(each, of)
                parts += [_number(stream.size), stream]
        return parts
    return [each.reshape(-1) for each in symbols]


def decode(name: str, reader: Reader, levels: Levels, counts: tuple[int, int]) -> list[Bytes]:
    """[groups, elements] of keys, and of values. Raises :class:`CodecFailed`."""
    shapes = [(len(of), count) for of, count in zip(levels, counts, strict=True)]
    if name == "pack":
        return [pack.unpack(reader, of, count) for of, count in zip(levels, counts, strict=True)]
    if name == "zstd":
        plain = unframe(reader, sum(groups * count for groups, count in shapes))
        border = shapes[0][0] * shapes[0][1]
        return [plain[:border].reshape(shapes[0]), plain[border:].reshape(shapes[1])]
    if name == "rans":
        return [
            rans.decode(reader.take(reader.number("size of a stream"), "stream"), of, count)
            if count
            else np.empty((len(of), 0), np.uint8)
            for of, count in zip(levels, counts, strict=True)
        ]
    return [reader.take(groups * count, "symbols").reshape(groups, count) for groups, count in shapes]


def frame(plain: Bytes) -> list[Bytes]:
    """zstd's, and its size in front."""
    made = np.frombuffer(_zstd.compressor.compress(plain.data), np.uint8)
    return [_number(made.size), made]


def unframe(reader: Reader, nbytes: int) -> Bytes:
    """A frame says how large it will be, and is believed only if that is what is waited for. Raises
    :class:`CodecFailed`."""
    content = reader.take(reader.number("size of a frame"), "frame").data
    try:
        told = zstandard.frame_content_size(content)
        if told != nbytes:
            raise CodecFailed(f"frame: of {told} bytes, {nbytes} expected")
        plain = _zstd.decompressor.decompress(content, max_output_size=nbytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecFailed(f"frame: {error}") from None
    if len(plain) != nbytes:
        raise CodecFailed(f"frame: {len(plain)} bytes came out, {nbytes} expected")
    return np.frombuffer(plain, np.uint8)


def _number(value: int) -> Bytes:
    return np.frombuffer(value.to_bytes(4, "little"), np.uint8)
