"""Who missed the time allowed too often of late, and rests for it.

Counts decisions, not seconds: where nothing is sent, nothing is forgotten either. Rest ends by itself, with a
clean record.
"""

from __future__ import annotations

from collections import deque


class Guard:
    """More than ``max_misses`` in the last ``window`` uses: a rest of ``rest`` decisions."""

    def __init__(self, window: int, max_misses: int, rest: int) -> None:
        self._window, self._max_misses, self._rest = window, max_misses, rest
        self._decisions = 0
        self._recent: dict[str, deque[bool]] = {}
        self._rests_until: dict[str, int] = {}

    def decided(self) -> None:
        """Once a decision."""
        self._decisions += 1

    def rests(self, name: str) -> bool:
        """Is it not to be chosen?"""
        return self._rests_until.get(name, 0) > self._decisions

    def used(self, name: str, *, missed: bool) -> None:
        """One use has ended."""
        recent = self._recent.setdefault(name, deque(maxlen=self._window))
        recent.append(missed)
        if sum(recent) > self._max_misses:
            self._rests_until[name] = self._decisions + self._rest
            recent.clear()

    def check_integrity(self) -> None:
        """Raises AssertionError."""
        for name, recent in self._recent.items():
            assert len(recent) <= self._window and sum(recent) <= self._max_misses, f"{name} should rest"
        for name, until in self._rests_until.items():
            assert until <= self._decisions + self._rest, f"{name} rests until {until}"
