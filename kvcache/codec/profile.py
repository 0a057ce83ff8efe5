"""What a codec does to KV: a profile's parameters and their bounds. Plain data.

Owns names and bounds of the steps. Must not know bytes, kernels or torch: a router reads profiles too.
"""

from __future__ import annotations

import msgspec

from microserve.protocol.errors import ConfigError

VERSION = 1
"""Of payloads; ``Profile.needs`` names it."""
TRANSFORMS = ("none", "hadamard")
QUANTISERS = ("none", "uniform", "mixed_head", "mixed_layer")
CODERS = ("none", "pack", "zstd", "rans")
MIN_LEVELS, MAX_LEVELS = 2, 256


class Levels(msgspec.Struct, frozen=True):
    """How many values a quantised element has, 2 to 256; 0: not quantised. ``low`` is for mixed quantisers,
    of the heads or layers that matter less."""

    high: int = 0
    low: int = 0


class Profile(msgspec.Struct, frozen=True):
    """:class:`ConfigError` names a field that is out of bounds, or that does not go with another."""

    name: str
    """Unique in a library, as ``mixhq-h80-12/10-6/4-rans``; not in a payload."""
    transform: str = "none"
    """``none``; ``hadamard``: each head rotated, which spreads outliers over its channels."""
    quantiser: str = "none"
    """``none``; ``uniform``: the same levels everywhere; ``mixed_head``: ``low`` for the heads that are
    scored lowest of all layers; ``mixed_layer``: ``low`` for the last layers."""
    keys: Levels = Levels()
    """Scaled by channel, over the tokens of a payload."""
    values: Levels = Levels()
    """Scaled by token, over the channels of all heads that have the same levels."""
    low_ratio: float = 0.0
    """Fraction of all heads, or of layers, that get ``low``."""
    coder: str = "none"
    """``none``: a byte for each element; ``pack``: as many bits as its levels need; ``zstd``; ``rans``: as
    many as its frequency asks for. Without quantiser ``zstd`` and ``rans`` code exponents alone, exactly."""

    def __post_init__(self) -> None:
        for field, known in (("transform", TRANSFORMS), ("quantiser", QUANTISERS), ("coder", CODERS)):
            if getattr(self, field) not in known:
                raise ConfigError(
                    f"{field} is {getattr(self, field)!r}, one of {', '.join(known)}", field=field
                )
        if not 0.0 <= self.low_ratio <= 1.0:
            raise ConfigError(f"low_ratio is {self.low_ratio}, 0 to 1", field="low_ratio")
        for field in ("keys", "values"):
            self._check_levels(field, getattr(self, field))
        if not self.is_mixed and self.low_ratio:
            raise ConfigError("low_ratio is for mixed quantisers", field="low_ratio")
        if not self.is_lossy and self.transform != "none":
            raise ConfigError(f"{self.transform} rounds: it needs a quantiser", field="transform")
        if not self.is_lossy and self.coder == "pack":
            raise ConfigError("pack needs a quantiser", field="coder")

    def _check_levels(self, field: str, levels: Levels) -> None:
        for name, count, is_used in (
            ("high", levels.high, self.is_lossy),
            ("low", levels.low, self.is_mixed),
        ):
            if is_used and not MIN_LEVELS <= count <= MAX_LEVELS:
                raise ConfigError(
                    f"{field}.{name} is {count}, {MIN_LEVELS} to {MAX_LEVELS}", field=f"{field}.{name}"
                )
            if not is_used and count:
                raise ConfigError(
                    f"{field}.{name} is {count}: the quantiser {self.quantiser} has none",
                    field=f"{field}.{name}",
                )

    @property
    def is_lossy(self) -> bool:
        return self.quantiser != "none"

    @property
    def is_mixed(self) -> bool:
        return self.quantiser.startswith("mixed_")

    @property
    def needs(self) -> str:
        """What a decoder must have in ``codec.SUPPORTED``, in words of grants."""
        return f"kv{VERSION}:{self.coder}"


NONE = Profile("none")
LOSSLESS = (Profile("lossless-zstd", coder="zstd"), Profile("lossless-rans", coder="rans"))
"""Exact, for any dtype; what is known without a library."""
