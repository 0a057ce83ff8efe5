"""KV of known numbers as raw rows, and profiles of every kind, for tests of codecs."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from microserve.kvcache.codec.profile import CODERS, QUANTISERS, TRANSFORMS, Levels, Profile
from microserve.protocol.messages.kv.geometry import Geometry

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def geometry(dtype: str = "bfloat16", heads: int = 3, dim: int = 8, layers: int = 4) -> Geometry:
    return Geometry(
        dtype=dtype, order="rows", block_size=16, num_layers=layers, num_kv_heads=heads, head_dim=dim
    )


def to_rows(numbers: Floats, dtype: str) -> Bytes:
    """[tokens, elements] -> [tokens, bytes]; bfloat16 by leaving bits out."""
    if dtype == "bfloat16":
        return (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    with np.errstate(over="ignore"):
        cast = numbers.astype(np.float16 if dtype == "float16" else np.float32)
    return np.ascontiguousarray(cast).view(np.uint8)


def to_floats(rows: Bytes, dtype: str) -> Floats:
    rows = np.ascontiguousarray(rows)
    if dtype == "bfloat16":
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return rows.view(np.float16 if dtype == "float16" else np.float32).astype(np.float32)


def random_rows(of: Geometry, tokens: int, seed: int = 0, scale: float = 1.0) -> Bytes:
    """[K | V][tokens, bytes]: channels of different means and widths, as keys have them."""
    random = np.random.default_rng(seed)
    channels = of.num_kv_heads * of.head_dim
    made = random.standard_normal((2, tokens, channels)) * random.uniform(0.1, 3, channels)
    made = (made + random.standard_normal(channels)) * scale
    return np.stack([to_rows(half.astype(np.float32), of.dtype) for half in made])


def profiles() -> list[Profile]:
    """Of every transform, quantiser and coder that go together."""
    made = []
    for transform, quantiser, coder in itertools.product(TRANSFORMS, QUANTISERS, CODERS):
        is_lossy, is_mixed = quantiser != "none", quantiser.startswith("mixed")
        if not is_lossy and (transform != "none" or coder == "pack"):
            continue
        made.append(
            Profile(
                f"{transform}-{quantiser}-{coder}",
                transform=transform,
                quantiser=quantiser,
                keys=Levels(12 if is_lossy else 0, 6 if is_mixed else 0),
                values=Levels(10 if is_lossy else 0, 4 if is_mixed else 0),
                low_ratio=0.5 if is_mixed else 0.0,
                coder=coder,
            )
        )
    return made


def scores(of: Geometry) -> Floats:
    """Of each head of each layer, all different."""
    count = of.num_layers * of.num_kv_heads
    return (np.arange(count, dtype=np.float32) * 7 % count).reshape(of.num_layers, of.num_kv_heads)
