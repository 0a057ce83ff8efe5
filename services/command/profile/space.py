"""What is searched: profiles by their parameters, in spaces that have names.

What a profile loses does not depend on its coder. So a search asks for *ways to lose* (profiles without a
coder), and what was measured of one holds for it with every coder.
"""

from __future__ import annotations

from itertools import product

import msgspec

from microserve.kvcache.codec.profile import Levels, Profile

CODERS = ("pack", "zstd", "rans")
SMALLEST = "rans"
"""The coder by whose ratio candidates are compared."""
PAPER, WIDE, SMALL = "paper", "wide", "small"
SPACES = (PAPER, WIDE, SMALL)


def ways(space: str) -> list[Profile]:
    """Lossy profiles with coder ``none``, each once."""
    if space == PAPER:  # KVServe's grid of 144
        return _mixed("mixed_head", (0.3, 0.5, 0.7, 0.9), (12, 10, 8), (12, 10, 8), (6, 4), (6, 4))
    if space == SMALL:
        return _uniform((16, 64, 256), (16, 64, 256))
    found = []
    levels = (8, 16, 32, 64, 128)
    for each in (
        *_uniform(levels, levels),
        *_mixed("mixed_head", (0.25, 0.5, 0.75), (32, 64, 128), (32, 64, 128), (8, 16), (8, 16)),
        *_mixed("mixed_layer", (0.33,), (32, 64, 128), (32, 64, 128), (8, 16), (8, 16)),
    ):
        found += [each, _named(msgspec.structs.replace(each, transform="hadamard"))]
    return found


def with_coder(way: Profile, coder: str) -> Profile:
    return _named(msgspec.structs.replace(way, coder=coder))


def parameters(way: Profile) -> dict[str, str | float]:
    """What a surrogate goes by. Without low levels a way is as one whose levels are all the same."""
    low_keys, low_values = way.keys.low or way.keys.high, way.values.low or way.values.high
    return {
        "transform": way.transform,
        "quantiser": way.quantiser,
        "low_ratio": way.low_ratio,
        "keys_high": float(_bits(way.keys.high)),
        "keys_low": float(_bits(low_keys)),
        "values_high": float(_bits(way.values.high)),
        "values_low": float(_bits(low_values)),
    }


def _bits(levels: int) -> float:
    """An error halves with each: what it does to a score is even in bits, not in levels."""
    from math import log2

    return log2(levels)


def _uniform(keys: tuple[int, ...], values: tuple[int, ...]) -> list[Profile]:
    return [
        _named(Profile("", quantiser="uniform", keys=Levels(key), values=Levels(value)))
        for key, value in product(keys, values)
    ]


def _mixed(
    quantiser: str,
    ratios: tuple[float, ...],
    high_keys: tuple[int, ...],
    high_values: tuple[int, ...],
    low_keys: tuple[int, ...],
    low_values: tuple[int, ...],
) -> list[Profile]:
    return [
        _named(
            Profile(
                "",
                quantiser=quantiser,
                keys=Levels(high_key, low_key),
                values=Levels(high_value, low_value),
                low_ratio=ratio,
            )
        )
        for ratio, high_key, high_value, low_key, low_value in product(
            ratios, high_keys, high_values, low_keys, low_values
        )
    ]


def _named(profile: Profile) -> Profile:
    """As ``head80-12/10-6/4-rans``: share and place of what is low, levels of keys and values that are high,
    and low, coder."""
    parts = ["hadamard"] if profile.transform != "none" else []
    kind = profile.quantiser.removeprefix("mixed_")
    parts.append(kind if not profile.is_mixed else f"{kind}{round(profile.low_ratio * 100)}")
    parts.append(f"{profile.keys.high}/{profile.values.high}")
    if profile.is_mixed:
        parts.append(f"{profile.keys.low}/{profile.values.low}")
    if profile.coder != "none":
        parts.append(profile.coder)
    return msgspec.structs.replace(profile, name="-".join(parts))
