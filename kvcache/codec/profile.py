"""A way to make KV small: which steps, with which parameters. Plain data.

    transform -> quantiser -> coder     of the keys and values of one layer and a range of tokens

Without a quantiser nothing is lost, whatever the coder. Does not know how a step is done.
"""

from __future__ import annotations

import msgspec


class Levels(msgspec.Struct, frozen=True):
    """Counts of levels, 2 to 256; ``low`` of mixed quantisers only."""

    high: int = 0
    low: int = 0


class Profile(msgspec.Struct, frozen=True):
    """One way. Keys are quantised per channel (over the tokens of the payload), values per token (over heads
    and channels)."""

    name: str
    """Unique in a library, as ``mixhq-h80-12/10-6/4-rans``."""
    transform: str = "none"
    """``none`` or ``hadamard``."""
    quantiser: str = "none"
    """``none``, ``uniform`` (takes ``high`` alone), ``mixed_head`` or ``mixed_layer``."""
    keys: Levels = Levels()
    values: Levels = Levels()
    low_ratio: float = 0.0
    """Share of the heads with the lowest scores of all (``mixed_head``), or of the last layers
    (``mixed_layer``), that get ``low`` levels."""
    coder: str = "none"
    """``none``, ``pack`` (bits), ``zstd`` or ``rans``."""

    @property
    def is_lossy(self) -> bool:
        return self.quantiser != "none"


NONE = Profile("none")
"""KV as it is."""
