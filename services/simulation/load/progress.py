"""How far a run has got: told to who waits for it at a terminal, and judged, so that it comes to an end.

A strategy that asks and asks, or sleeps for no time at all, makes a run that never ends: it is ended here, in
one sentence. Owns that line and these bounds. Knows a run by its numbers only.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from microserve.protocol.errors import StrategyError

MAX_IDLE_EVENTS = 1_500_000
"""Callbacks in which no token came though somebody waits for one: ten seconds of CPU and more."""
CLEAR = "\r\x1b[K"
TELL_EVERY_S = 0.5
"""By the real clock."""


class Progress:
    """Of one run."""

    def __init__(self, name: str, num_requests: int, max_wall_s: float, told: TextIO | None = None) -> None:
        """``told``: a terminal, or nobody."""
        self._name = name
        self._num_requests = num_requests
        self._max_wall_s = max_wall_s
        self._told = told
        self._began_s = self._told_s = time.monotonic()
        self._num_tokens = -1
        self._num_events = 0

    def look(
        self, now: float, num_events: int, num_tokens: int, is_awaited: bool, count_ended: Callable[[], int]
    ) -> None:
        """``now``: virtual seconds; callbacks and tokens so far; whether a request waits for its end. Raises
        :class:`StrategyError` when it goes on for ever."""
        clock_s = time.monotonic()
        if clock_s - self._began_s > self._max_wall_s:
            raise StrategyError(
                f"{self._name}: ended after {clock_s - self._began_s:.0f} s (--max-wall): {count_ended()} of "
                f"{self._num_requests} requests were served in {now:.0f} virtual seconds"
            )
        if not is_awaited or self._num_tokens != num_tokens:
            self._num_tokens, self._num_events = num_tokens, num_events
        elif num_events - self._num_events > MAX_IDLE_EVENTS:
            raise StrategyError(
                f"{self._name} goes round and round: {MAX_IDLE_EVENTS:,} events without one token, at "
                f"{now:.3f} virtual seconds, {count_ended()} of {self._num_requests} requests served"
            )
        if self._told is not None and clock_s - self._told_s > TELL_EVERY_S:
            self._told_s = clock_s
            text = (
                f"{self._name}: {count_ended()} of {self._num_requests} requests, {now:,.0f} virtual seconds"
            )
            self._told.write(f"{CLEAR}{text}")
            self._told.flush()

    def close(self) -> None:
        """Take the line away."""
        if self._told is not None:
            self._told.write(CLEAR)
            self._told.flush()


class Runs:
    """Counts runs at a terminal where several processes make them; a context manager."""

    def __init__(self, num_runs: int) -> None:
        self._told = terminal()
        self._num_runs = num_runs
        self._num_done = 0

    def __enter__(self) -> Runs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tell("")

    def add_one(self) -> None:
        self._num_done += 1
        self._tell(f"{self._num_done} of {self._num_runs} runs")

    def _tell(self, text: str) -> None:
        if self._told is not None:
            self._told.write(f"{CLEAR}{text}")
            self._told.flush()


def terminal() -> TextIO | None:
    """Where a person looks on, if one does."""
    return sys.stderr if sys.stderr.isatty() else None
