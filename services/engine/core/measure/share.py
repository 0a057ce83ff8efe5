"""What share of its time an engine spends on something, the last seconds counting most.

Sans-I/O; ``now`` is of one monotonic clock.
"""

from __future__ import annotations

import math

SHARE_S = 5.0
"""Time constant: some prompts are to fall into it, and yet it is to follow the load."""


class Share:
    """``spent`` after each stretch of it; 0 to 1. Shares of what excludes one another add up to at most 1."""

    __slots__ = ("_at", "_value")

    def __init__(self) -> None:
        self._value = 0.0
        self._at = 0.0

    def at(self, now: float) -> float:
        return self._value * math.exp(min(0.0, self._at - now) / SHARE_S)

    def spent(self, seconds: float, now: float) -> None:
        """Until ``now``, which is no earlier than the last one."""
        if seconds > 0.0:
            before = self.at(now)
            self._value, self._at = min(1.0, before + 1.0 - math.exp(-seconds / SHARE_S)), now
