"""How every version has fared since the router's start: counts, times and sums, of a bounded size. Sans-I/O.

By strategy, version and share, and of each of these by the engine that generated. A time goes into a
logarithmic histogram of fixed buckets: unlike a reservoir's, those of several routers are added without loss,
its quantiles are 5 % off at most however many requests there were, and it takes 0.8 kB. Decides nothing
(window.py, trial.py).
"""

from __future__ import annotations

import math
from array import array
from collections import Counter

from microserve.protocol.messages.router import Ended
from microserve.protocol.messages.strategy.control import MAX_CONTROL_ENTRIES
from microserve.protocol.messages.strategy.decisions import MAX_SCORES
from microserve.protocol.messages.strategy.scores import (
    BUCKETS_PER_DOUBLING,
    FIRST_BUCKET_S,
    NUM_BUCKETS,
    Score,
    Times,
)
from microserve.services.router.rollout.sums import Sums, Timing

MAX_VERSIONS = 2 * MAX_CONTROL_ENTRIES
MAX_ENGINE_SCORES = 1024
"""Beyond these the one that has had no request for the longest time is forgotten."""
MAX_CODES = 16
OTHER = "other"
"""Stands for further error codes."""

_SCALE = BUCKETS_PER_DOUBLING / math.log(2)
_FIRST = math.log(FIRST_BUCKET_S)


class _Tally:
    """Of one measure."""

    __slots__ = ("_counts", "_log_square_sum", "_log_sum", "_num")

    def __init__(self) -> None:
        self._num = 0
        self._log_sum = 0.0
        self._log_square_sum = 0.0
        self._counts = array("I", bytes(4 * NUM_BUCKETS))

    def add(self, log_s: float) -> None:
        """``log_s``: natural logarithm of seconds."""
        self._num += 1
        self._log_sum += log_s
        self._log_square_sum += log_s * log_s
        bucket = int((log_s - _FIRST) * _SCALE)
        self._counts[0 if bucket < 0 else bucket if bucket < NUM_BUCKETS else NUM_BUCKETS - 1] += 1

    def absorb(self, other: _Tally) -> None:
        self._num += other._num
        self._log_sum += other._log_sum
        self._log_square_sum += other._log_square_sum
        for bucket, count in enumerate(other._counts):
            if count:
                self._counts[bucket] += count

    def told(self) -> Times:
        buckets = {number: count for number, count in enumerate(self._counts) if count}
        return Times(self._num, self._log_sum, self._log_square_sum, buckets)


class _Cell:
    __slots__ = (
        *("began", "codes", "jct", "last", "num_mistakes", "num_moves", "num_requests"),
        *("tokens", "tpot", "ttft"),
    )

    def __init__(self, now: float) -> None:
        self.began = self.last = now
        self.num_requests = self.num_mistakes = self.num_moves = 0
        self.codes: Counter[str] = Counter()
        self.tokens = [0, 0, 0, 0]
        """Of prompts, cached, received, of output."""
        self.ttft, self.tpot, self.jct = _Tally(), _Tally(), _Tally()

    def absorb(self, other: _Cell) -> None:
        self.began, self.last = min(self.began, other.began), max(self.last, other.last)
        self.num_requests += other.num_requests
        self.num_mistakes += other.num_mistakes
        self.num_moves += other.num_moves
        for code, count in other.codes.items():
            self.codes[code if code in self.codes or len(self.codes) < MAX_CODES else OTHER] += count
        self.tokens = [mine + its for mine, its in zip(self.tokens, other.tokens, strict=True)]
        for mine, its in ((self.ttft, other.ttft), (self.tpot, other.tpot), (self.jct, other.jct)):
            mine.absorb(its)

    def add(self, now: float, ended: Ended, failed: bool, timing: Timing) -> None:
        self.last = now
        self.num_requests += 1
        self.num_mistakes += failed
        self.num_moves += ended.num_moves
        if ended.code:
            code = ended.code if ended.code in self.codes or len(self.codes) < MAX_CODES else OTHER
            self.codes[code] += 1
        usage, tokens = ended.usage, self.tokens
        tokens[0] += usage.prompt_tokens
        tokens[1] += usage.cached_tokens
        tokens[2] += usage.received_tokens
        tokens[3] += usage.output_tokens
        if timing.ttft is not None:
            self.ttft.add(timing.ttft)
        if timing.tpot is not None:
            self.tpot.add(timing.tpot)
        if timing.jct is not None:
            self.jct.add(timing.jct)


class _Version:
    """What of a version is of no engine, or of engines that had to make room; and the sums over all of it."""

    def __init__(self, now: float) -> None:
        self.rest = _Cell(now)
        self.sums = Sums()
        self.last = now


class Scoreboard:
    def __init__(self) -> None:
        self._versions: dict[tuple[str, int, str], _Version] = {}
        self._engines: dict[tuple[str, int, str, str], _Cell] = {}
        """A request counts once: a version's own is the sum of its engines' and of its rest."""

    def add(self, now: float, ended: Ended, failed: bool, timing: Timing, num_unheld: int) -> None:
        """An admitted request has ended, at ``now`` (seconds, monotonic)."""
        key = (ended.strategy, ended.strategy_version, ended.share)
        version = self._versions.get(key)
        if version is None:
            if len(self._versions) >= MAX_VERSIONS:
                self._forget(min(self._versions, key=lambda each: self._versions[each].last))
            version = self._versions[key] = _Version(now)
        version.last = now
        version.sums.add(failed or bool(ended.code), timing, num_unheld, ended.usage)
        cell = version.rest
        if ended.engines:
            place = (*key, ended.engines[-1])
            found = self._engines.get(place)
            cell = self._place(place, now) if found is None else found
        cell.add(now, ended, failed, timing)

    def _place(self, place: tuple[str, int, str, str], now: float) -> _Cell:
        if len(self._engines) >= MAX_ENGINE_SCORES:
            oldest = min(self._engines, key=lambda each: self._engines[each].last)
            self._versions[oldest[:3]].rest.absorb(self._engines.pop(oldest))
        made = self._engines[place] = _Cell(now)
        return made

    def _forget(self, key: tuple[str, int, str]) -> None:
        del self._versions[key]
        for place in [place for place in self._engines if place[:3] == key]:
            del self._engines[place]

    def told(self, now: float, strategy: str = "") -> tuple[list[Score], int]:
        """Of one strategy, or of all; and how many more there are than go into one message."""
        found = []
        engines = []
        for key, version in self._versions.items():
            if strategy not in ("", key[0]):
                continue
            whole = _Cell(now)
            whole.absorb(version.rest)
            for place, cell in self._engines.items():
                if place[:3] == key:
                    whole.absorb(cell)
                    engines.append(_score(key, place[3], cell, now))
            found.append(_score(key, "", whole, now, version.sums))
        found += sorted(engines, key=lambda score: -score.num_requests)
        return found[:MAX_SCORES], max(0, len(found) - MAX_SCORES)

    def __len__(self) -> int:
        """Versions."""
        return len(self._versions)


def _score(
    key: tuple[str, int, str], engine_id: str, cell: _Cell, now: float, sums: Sums | None = None
) -> Score:
    prompt_tokens, cached_tokens, received_tokens, output_tokens = cell.tokens
    return Score(
        *key,
        engine_id,
        cell.num_requests,
        dict(cell.codes),
        cell.num_mistakes,
        cell.num_moves,
        prompt_tokens,
        cached_tokens,
        received_tokens,
        output_tokens,
        cell.ttft.told(),
        cell.tpot.told(),
        cell.jct.told(),
        max(0.0, now - cell.began),
        None if sums is None else sums.told(),
    )
