"""KV of one layer and some tokens into a payload, and back.

Owns the two calls, and what is refused before a byte is looked at. Must not know where rows lie, who asks, or
whether it is worth it; what stands behind a payload's header is steps/body.py's. Start at :class:`Codec`.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from microserve.kernels.codec.native import native_codec
from microserve.kvcache.codec.frame import (
    DTYPES,
    HEADER_NBYTES,
    ITEM_NBYTES,
    MAX_TENSOR_NBYTES,
    Bytes,
    CodecFailed,
    Header,
    header,
    seal,
)
from microserve.kvcache.codec.profile import Profile
from microserve.kvcache.codec.steps import body, transform
from microserve.kvcache.codec.steps.body import Mask, Task
from microserve.kvcache.codec.steps.coder import SUPPORTED
from microserve.kvcache.codec.steps.native import NativeBody
from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.kv.geometry import Geometry

__all__ = ["SUPPORTED", "Codec", "CodecFailed", "Header", "decode", "header"]

Scores = npt.NDArray[np.float32]


class _Way(Protocol):
    def put(self, task: Task, is_high: Mask, rows: Sequence[Bytes], out: Bytes) -> int | None: ...
    def take(self, task: Task, body: Bytes, rows: Sequence[Bytes]) -> None: ...


@functools.cache
def _way() -> _Way:
    """By C++ where there is any; the first call may compile it."""
    return body if (native := native_codec()) is None else NativeBody(native)


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
        """``head_scores``: [layers, heads], for ``mixed_head`` alone. The first one of a process may take
        seconds, in which C++ is compiled. Raises :class:`ConfigError`."""
        _way()
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
        if out.size < HEADER_NBYTES:
            return None
        task = Task(profile, geometry.dtype, geometry.num_kv_heads, geometry.head_dim, layer, self._seed)
        made = _way().put(task, self._is_high[layer], (keys, values), out[HEADER_NBYTES:])
        if made is None:
            return None
        nbytes = HEADER_NBYTES + made
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
    content = payload[HEADER_NBYTES : said.nbytes]
    if zlib.crc32(content.data) != said.crc32:
        raise CodecFailed("the payload's crc32 is another: its bytes are not those that were sent")
    task = Task(profile, said.dtype, said.num_heads, said.head_dim, layer, said.seed)
    _way().take(task, content, (keys, values))
    return said


def _high_heads(profile: Profile, geometry: Geometry, scores: Scores | None) -> Mask:
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
