"""What a router remembers of its checks: numbers for its metrics, and what it tells the index. Sans-I/O."""

from __future__ import annotations

from collections import Counter

import msgspec

from microserve.protocol.messages.check import DIFFERS, MAX_TOLD, UNFINISHED, PairCheck

MAX_DIFFERING = 256
"""Checks that found a difference and are told of until their pair is checked again."""


class CheckBook:
    def __init__(self) -> None:
        self._told: dict[tuple[str, str], tuple[PairCheck, float]] = {}
        """By pair, its last check and when it was over; the newest stand last."""
        self.num_by_outcome: Counter[str] = Counter()
        self.num_skipped = 0
        """Turns that were let go, for no pair had room."""
        self.took_s = 0.0
        self.num_tokens = 0
        self.passed_at: float | None = None
        """When the last one was over that compared all that it was to compare, whatever it found."""

    def add(self, check: PairCheck, now: float) -> None:
        self.num_by_outcome[check.outcome] += 1
        self.took_s += check.took_s
        self.num_tokens += check.num_tokens
        if check.outcome != UNFINISHED:
            self.passed_at = now
        elif check.pair in self._told and self._told[check.pair][0].outcome == DIFFERS:
            return  # what was found stands
        self._told.pop(check.pair, None)
        self._told[check.pair] = (check, now)
        old = [pair for pair, (each, _) in self._told.items() if each.outcome != DIFFERS][:-MAX_TOLD]
        differing = [pair for pair, (each, _) in self._told.items() if each.outcome == DIFFERS]
        for pair in old + differing[:-MAX_DIFFERING]:
            del self._told[pair]

    def keep(self, engine_ids: set[str]) -> None:
        """Forget the checks of engines that are not among these."""
        gone = [pair for pair in self._told if not all(each in engine_ids for each in pair if each)]
        for pair in gone:
            del self._told[pair]

    def news(self) -> list[PairCheck]:
        """What the index is to hear, without ages: another one only after a check."""
        return [check for check, _ in self._told.values()]

    def told(self, now: float) -> list[PairCheck]:
        """The same with the ages of now."""
        return [msgspec.structs.replace(check, age_s=now - at) for check, at in self._told.values()]
