"""KV of one layer and some tokens into a payload, and back.

Owns what stands behind a payload's header:

    quantised    the mask of high heads, a bit each, lowest first (mixed quantisers only)
                 least and scale of the keys' channels, of the values' tokens (quantiser.py), float16
                 symbols, a byte each, heads outermost: K, then V; or as the coder has them:
                 pack    K's heads, V's heads
                 rans    for K, then V: u32 bytes of a stream, the stream
                 zstd    u32 bytes of a frame, the frame of K's symbols and V's
    exact        ``none``: the rows of K, the rows of V
                 else first planes as symbols are coded above, then K's other planes and V's

Must not know where rows lie, who asks, or whether it is worth it. Start at :class:`Codec`.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from microserve.kvcache.codec import coder, planes, transform
from microserve.kvcache.codec.coder import SUPPORTED
from microserve.kvcache.codec.frame import (
    DTYPES,
    HEADER_NBYTES,
    ITEM_NBYTES,
    MAX_TENSOR_NBYTES,
    Bytes,
    CodecFailed,
    Header,
    Reader,
    header,
    seal,
)
from microserve.kvcache.codec.profile import Profile
from microserve.kvcache.codec.quantiser import (
    Counts,
    groups,
    is_within,
    quantise_keys,
    quantise_values,
    read_grid,
    restore_keys,
    restore_values,
)
from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.kv.geometry import Geometry

__all__ = ["SUPPORTED", "Codec", "CodecFailed", "Header", "decode", "header"]

Scores = npt.NDArray[np.float32]
ONE_GROUP = ((256,), (256,))
"""Bytes of K, and of V, with a table for all."""


class Codec:
    """Encodes by one profile for one geometry; any number of threads may, once it is made."""

    def __init__(
        self,
        profile: Profile,
        geometry: Geometry,
        *,
        head_scores: Scores | None = None,
        seed: int = transform.SEED,
    ) -> None:
        """``head_scores``: [layers, heads], for ``mixed_head`` alone. Raises :class:`ConfigError`."""
        self.profile = profile
        self._geometry = geometry
        self._seed = seed if profile.transform != "none" else 0
        _check(profile, geometry)
        self._is_high = _high_heads(profile, geometry, head_scores)

    def encode(self, layer: int, keys: Bytes, values: Bytes, out: Bytes) -> int | None:
        """Bytes written into ``out``; None: they do not fit, or KV has what levels cannot hold (no number,
        or beyond 65504): it goes as it is, and nothing is promised of ``out``.

        ``keys``, ``values``: raw rows [tokens, bytes] of one layer. ``out``: contiguous. An exact profile
        takes rows of any width, so that blocks of unknown insides may be its "rows", with values of none."""
        geometry, profile = self._geometry, self.profile
        self._check_rows(layer, keys, values)
        size = out.size
        if size < HEADER_NBYTES:
            return None
        parts = self._quantised(layer, keys, values) if profile.is_lossy else self._exact(keys, values)
        if parts is None or (nbytes := HEADER_NBYTES + sum(part.size for part in parts)) > size:
            return None
        np.concatenate(parts, out=out[HEADER_NBYTES:nbytes])
        said = Header(
            profile=profile,
            dtype=geometry.dtype,
            num_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            layer=layer,
            num_tokens=len(keys),
            keys_row_nbytes=keys.shape[1],
            values_row_nbytes=values.shape[1],
            seed=self._seed,
        )
        seal(said, out[:nbytes])
        return nbytes

    def _check_rows(self, layer: int, keys: Bytes, values: Bytes) -> None:
        geometry = self._geometry
        if not 0 <= layer < geometry.num_layers:
            raise ConfigError(f"layer is {layer}, below {geometry.num_layers}", field="layer")
        _check_shapes(self.profile, geometry, keys, values)

    def _quantised(self, layer: int, keys: Bytes, values: Bytes) -> list[Bytes] | None:
        profile, geometry = self.profile, self._geometry
        is_high = self._is_high[layer]
        k, v = (planes.to_heads(rows, geometry.dtype, geometry.num_kv_heads) for rows in (keys, values))
        if not (is_within(k) and is_within(v)):
            return None
        if profile.transform != "none":
            signs = transform.signs(self._seed, layer, *is_high.shape, geometry.head_dim)
            k, v = transform.rotate(k, signs), transform.rotate(v, signs)
        levels = _levels(profile, is_high)
        made_k, made_v = quantise_keys(k, levels[0]), quantise_values(v, levels[1])
        if made_k is None or made_v is None:
            return None
        parts = [np.packbits(is_high, bitorder="little")] if profile.is_mixed else []
        parts += [grid.astype("<f2").view(np.uint8).reshape(-1) for grid in (made_k[0], made_v[0])]
        symbols = [made.reshape(len(is_high), -1) for made in (made_k[1], made_v[1])]
        return parts + coder.encode(profile.coder, symbols, [each.tolist() for each in levels])

    def _exact(self, keys: Bytes, values: Bytes) -> list[Bytes]:
        if self.profile.coder == "none":
            return [np.ascontiguousarray(rows).reshape(-1) for rows in (keys, values)]
        made = [planes.to_planes(rows, self._geometry.dtype) for rows in (keys, values)]
        first = [each[:1] for each in made]
        return coder.encode(self.profile.coder, first, ONE_GROUP) + [each[1:].reshape(-1) for each in made]


def decode(payload: Bytes, layer: int, geometry: Geometry, keys: Bytes, values: Bytes) -> Header:
    """Writes raw rows [tokens, bytes] into ``keys`` and ``values``, and gives the header back.

    ``payload`` may be longer than what its header says. Raises :class:`CodecFailed` for anything but a whole
    payload of that layer, geometry and number of tokens; what is in the rows then is not to be used."""
    said = header(payload)
    profile = said.profile
    _check_fits(said, payload, layer, geometry, keys, values)
    try:
        _check(profile, geometry)
        _check_shapes(profile, geometry, keys, values)
    except ConfigError as error:
        raise CodecFailed(error.detail) from None
    body = payload[HEADER_NBYTES : said.nbytes]
    if zlib.crc32(body.data) != said.crc32:
        raise CodecFailed("the payload's crc32 is another: its bytes are not those that were sent")
    reader = Reader(body)
    if profile.is_lossy:
        _restore(said, reader, keys, values)
    else:
        _copy_back(said, reader, keys, values)
    reader.end()
    return said


def _restore(said: Header, reader: Reader, keys: Bytes, values: Bytes) -> None:
    profile, shape = said.profile, (said.num_heads, said.num_tokens, said.head_dim)
    is_high = np.ones(said.num_heads, np.bool_)
    if profile.is_mixed:
        mask = np.unpackbits(reader.take(-(-said.num_heads // 8), "mask of heads"), bitorder="little")
        if mask[said.num_heads :].any():
            raise CodecFailed("mask of heads: a head too many")
        is_high = mask[: said.num_heads].astype(np.bool_)
    levels = _levels(profile, is_high)
    grid_k = read_grid(reader, (2, said.num_heads, said.head_dim), "scales of keys")
    grid_v = read_grid(reader, (len(groups(levels[1])), 2, said.num_tokens), "scales of values")
    count = said.num_tokens * said.head_dim
    symbols = coder.decode(profile.coder, reader, [each.tolist() for each in levels], (count, count))
    for each, of in zip(symbols, levels, strict=True):
        if (each >= of[:, None]).any():
            raise CodecFailed("symbols: one is beyond its levels")
    k = restore_keys(symbols[0].reshape(shape), grid_k)
    v = restore_values(symbols[1].reshape(shape), grid_v, levels[1])
    if profile.transform != "none":
        signs = transform.signs(said.seed, said.layer, said.num_heads, said.head_dim)
        k, v = transform.rotate_back(k, signs), transform.rotate_back(v, signs)
    planes.from_heads(k, said.dtype, keys)
    planes.from_heads(v, said.dtype, values)


def _copy_back(said: Header, reader: Reader, keys: Bytes, values: Bytes) -> None:
    if said.profile.coder == "none":
        for rows in (keys, values):
            rows[...] = reader.take(rows.size, "rows").reshape(rows.shape)
        return
    nbytes = ITEM_NBYTES[said.dtype]
    counts = (keys.size // nbytes, values.size // nbytes)
    first = coder.decode(said.profile.coder, reader, ONE_GROUP, counts)
    for rows, plane, count in zip((keys, values), first, counts, strict=True):
        rest = reader.take((nbytes - 1) * count, "planes").reshape(nbytes - 1, count)
        planes.from_planes(np.concatenate((plane.reshape(1, -1), rest)), rows)


def _levels(profile: Profile, is_high: npt.NDArray[np.bool_]) -> list[Counts]:
    """Of the heads: for keys, for values."""
    return [
        np.where(is_high, each.high, each.low).astype(np.int32) for each in (profile.keys, profile.values)
    ]


def _high_heads(profile: Profile, geometry: Geometry, scores: Scores | None) -> npt.NDArray[np.bool_]:
    """[layers, heads]. The lowest scored of all layers are low; of equal ones the first. Raises
    :class:`ConfigError`."""
    shape = (geometry.num_layers, geometry.num_kv_heads)
    is_high = np.ones(shape, np.bool_)
    if profile.quantiser == "mixed_layer":
        is_high[geometry.num_layers - round(profile.low_ratio * geometry.num_layers) :] = False
    if profile.quantiser != "mixed_head":
        return is_high
    if scores is None or scores.shape != shape or not np.isfinite(scores).all():
        raise ConfigError(f"head_scores must be {shape[0]} x {shape[1]} numbers", field="head_scores")
    lowest = np.argsort(scores.reshape(-1), kind="stable")[: round(profile.low_ratio * scores.size)]
    is_high.reshape(-1)[lowest] = False
    return is_high


def _check(profile: Profile, geometry: Geometry) -> None:
    """Raises :class:`ConfigError` where the one is not for the other."""
    if profile.needs not in SUPPORTED:
        raise ConfigError(f"coder is {profile.coder}: the package zstandard is not installed", field="coder")
    if geometry.dtype not in DTYPES:
        raise ConfigError(
            f"dtype is {geometry.dtype or 'not said'}, one of {', '.join(DTYPES)}", field="dtype"
        )
    if geometry.quantization:
        raise ConfigError(f"KV is in {geometry.quantization} already", field="quantization")
    for field, limit in (("num_kv_heads", 0xFFFF), ("head_dim", 0xFFFF), ("num_layers", 0x10000)):
        if not 1 <= getattr(geometry, field) <= limit:
            raise ConfigError(f"{field} is {getattr(geometry, field)}, 1 to {limit}", field=field)
    if profile.is_lossy and geometry.order != "rows":
        raise ConfigError(f"levels need rows; this KV's order is {geometry.order!r}", field="order")


def _check_shapes(profile: Profile, geometry: Geometry, keys: Bytes, values: Bytes) -> None:
    """Raises :class:`ConfigError`."""
    item = ITEM_NBYTES[geometry.dtype]
    if keys.ndim != 2 or values.ndim != 2 or not len(keys) or len(keys) != len(values):
        raise ConfigError(
            f"rows of {keys.shape} and {values.shape}: not as many keys as values", field="keys"
        )
    for field, rows in (("keys", keys), ("values", values)):
        if rows.size > MAX_TENSOR_NBYTES:
            raise ConfigError(f"{field} have {rows.size} bytes, at most {MAX_TENSOR_NBYTES}", field=field)
        width = geometry.num_kv_heads * geometry.head_dim * item
        if rows.shape[1] % item or (profile.is_lossy and rows.shape[1] != width):
            raise ConfigError(f"{field} have {rows.shape[1]} bytes a token, {width} expected", field=field)


def _check_fits(
    said: Header, payload: Bytes, layer: int, geometry: Geometry, keys: Bytes, values: Bytes
) -> None:
    """What was sent is what is waited for. Raises :class:`CodecFailed`."""
    for what, theirs, ours in (
        ("layer", said.layer, layer),
        ("dtype", said.dtype, geometry.dtype),
        ("heads", said.num_heads, geometry.num_kv_heads),
        ("head_dim", said.head_dim, geometry.head_dim),
        ("tokens", said.num_tokens, len(keys)),
        ("bytes of a token's keys", said.keys_row_nbytes, keys.shape[1]),
        ("bytes of a token's values", said.values_row_nbytes, values.shape[1]),
    ):
        if theirs != ours:
            raise CodecFailed(f"{what}: the payload has {theirs}, {ours} expected")
    if said.nbytes > payload.size:
        raise CodecFailed(f"the payload is of {said.nbytes} bytes, and {payload.size} are here")
