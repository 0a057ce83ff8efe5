"""What each key has used, by day: counts in memory, and what of them is not yet in the ledger.

Sans-I/O. Days are UTC's, from the wall clock: budgets and bills go by what people call a day. Two days are
kept, so that a clock that is set to and fro over midnight loses nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

DAY_S = 86_400
MAX_DAYS = 2


@dataclass(frozen=True, slots=True)
class Counts:
    """What was used."""

    requests: int = 0
    """That were let in, whatever became of them."""
    refused: int = 0
    """For being beyond a limit of the key."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt tokens, those that came from the key's own cache."""
    output_tokens: int = 0

    @property
    def tokens(self) -> int:
        """What limits and budgets go by."""
        return self.prompt_tokens + self.output_tokens

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.requests + other.requests,
            self.refused + other.refused,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
        )


Deltas = dict[tuple[str, str], Counts]
"""By day and name."""


def day_of(wall: float) -> str:
    """``2026-11-29``, UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime(wall))


def seconds_left_of(wall: float) -> float:
    """Until the next day begins."""
    return DAY_S - wall % DAY_S


class UsageBook:
    """Every key's counts; ``take``, ``written`` and ``put_back`` are for who keeps the ledger."""

    def __init__(self) -> None:
        self.total: dict[str, Counts] = {}
        """By name, since this process began: for ``/metrics``."""
        self.news = asyncio.Event()
        """Something is to be written."""
        self._pending: Deltas = {}
        self._flying: Deltas = {}
        """Handed to the ledger, which has not answered yet."""
        self._shared: Deltas = {}
        """What the ledger says that all gateways have used."""

    def add(self, wall: float, name: str, counts: Counts) -> None:
        self.total[name] = self.total.get(name, Counts()) + counts
        self.news.set()
        key = (day_of(wall), name)
        if key in self._pending:
            self._pending[key] += counts
            return
        self._pending[key] = counts
        days = sorted({day for day, _ in self._pending}, reverse=True)
        for day in days[MAX_DAYS:]:  # a ledger that cannot be written for days costs bounded memory
            for key in [key for key in self._pending if key[0] == day]:
                del self._pending[key]

    def tokens_of(self, wall: float, name: str) -> int:
        """What the name has used on this day, as far as is known here."""
        key = (day_of(wall), name)
        return sum(book[key].tokens for book in (self._shared, self._flying, self._pending) if key in book)

    def take(self) -> Deltas:
        """What the ledger is to add now."""
        self._flying, self._pending = self._pending, {}
        return dict(self._flying)

    def written(self, shared: Mapping[tuple[str, str], Counts]) -> None:
        """The ledger has added what it took, and these are its sums for the days that count."""
        self._flying = {}
        self._shared = dict(shared)

    def put_back(self) -> None:
        """The ledger has not added it."""
        flying, self._flying = self._flying, {}
        _merge(self._pending, flying)


def _merge(into: Deltas, deltas: Mapping[tuple[str, str], Counts]) -> None:
    for key, counts in deltas.items():
        into[key] = into.get(key, Counts()) + counts
