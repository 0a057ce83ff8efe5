"""A token bucket: what may be used a minute, and when there is enough again.

Sans-I/O. Holds a minute's worth at most, so a client that was away may use that much at once. What is used
without having been asked for (an answer longer than was thought) is owed: the level goes below zero, and the
rate holds in the long run whatever the guesses were worth.
"""

from __future__ import annotations

MINUTE_S = 60.0


class Bucket:
    """``limit`` units a minute. ``now`` is monotonic, seconds; going back, it counts as standing still."""

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self._level = float(limit)
        self._at = now

    def change_limit(self, limit: int, now: float) -> None:
        """Another limit from now on; what has been used stays used."""
        self._fill(now)
        self._level = min(float(limit), self._level + limit - self.limit)
        self.limit = limit

    def level(self, now: float) -> float:
        """What may be used at once; below zero: what is owed."""
        self._fill(now)
        return self._level

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until ``amount`` is there; never more than a full bucket is waited for."""
        return max(0.0, min(amount, self.limit) - self.level(now)) * MINUTE_S / self.limit

    def take(self, amount: float, now: float) -> None:
        """Use it; negative: give back what was taken and not used."""
        self._fill(now)
        self._level = min(float(self.limit), self._level - amount)

    def reset_s(self, now: float) -> float:
        """Seconds until it is full."""
        return (self.limit - self.level(now)) * MINUTE_S / self.limit

    def _fill(self, now: float) -> None:
        passed_s = max(0.0, now - self._at)
        self._at = max(self._at, now)
        self._level = min(float(self.limit), self._level + passed_s * self.limit / MINUTE_S)
