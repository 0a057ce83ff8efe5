"""What keys have used, on disk (``gateway.usage_path``): one row a day and name, shared by all gateways that
have the file.

Owns a SQLite file and the thread that writes to it. Nothing waits for it: while it cannot be written, counts
stay in the book (usage.py) and are added later, and the log says so once.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import astuple
from pathlib import Path

import structlog

from microserve.gateway.keys.usage import DAY_S, Counts, Deltas, UsageBook, day_of
from microserve.protocol import log
from microserve.protocol.process.tick import until_tick

FLUSH_S = 1.0
BUSY_S = 2.0
"""Longest wait for another gateway that writes."""
CLOSE_S = 2.0
"""For the last counts, when the gateway ends."""

_COLUMNS = ("requests", "refused", "prompt_tokens", "cached_tokens", "output_tokens")
_SCHEMA = f"""CREATE TABLE IF NOT EXISTS usage (day TEXT NOT NULL, key TEXT NOT NULL,
    {" ".join(f"{each} INTEGER NOT NULL," for each in _COLUMNS)} PRIMARY KEY (day, key))"""
_ADD = f"""INSERT INTO usage VALUES (?, ?, {", ".join("?" for _ in _COLUMNS)}) ON CONFLICT (day, key)
    DO UPDATE SET {", ".join(f"{each} = {each} + excluded.{each}" for each in _COLUMNS)}"""
_logger = structlog.get_logger()


def add_counts(path: Path, deltas: Deltas, since: str) -> Deltas:
    """Add these to the file; all sums from the day ``since`` on. Raises ``OSError`` or ``sqlite3.Error``,
    and has added nothing then."""
    with closing(sqlite3.connect(path, timeout=BUSY_S)) as database, database:
        database.execute(_SCHEMA)
        rows = [(day, name, *astuple(counts)) for (day, name), counts in deltas.items()]
        database.executemany(_ADD, rows)
        found = database.execute("SELECT * FROM usage WHERE day >= ?", (since,)).fetchall()
    return {(day, name): Counts(*counts) for day, name, *counts in found}


def read_counts(path: Path, *, since: str = "", until: str = "9999") -> Deltas:
    """The sums of these days, both included. Raises ``sqlite3.Error`` when there is no such file."""
    address = f"{path.absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(address, timeout=BUSY_S, uri=True)) as database:
        found = database.execute(
            "SELECT * FROM usage WHERE day BETWEEN ? AND ? ORDER BY day, key", (since, until)
        ).fetchall()
    return {(day, name): Counts(*counts) for day, name, *counts in found}


class Ledger:
    """Writes a book to a file, from ``start`` to ``close``."""

    def __init__(
        self,
        path: str,
        book: UsageBook,
        wall_clock: Callable[[], float],
        *,
        asks_others: bool = True,
        flush_s: float = FLUSH_S,
    ) -> None:
        """``asks_others``: what other gateways count matters here, also while nothing is counted."""
        self._path = Path(path)
        self._book = book
        self._wall_clock = wall_clock
        self._asks_others = asks_others
        self._flush_s = flush_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="usage")
        self._stop = asyncio.Event()
        self._news = book.news
        self._task: asyncio.Task[None] | None = None
        self._is_failing = False

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="usage ledger")

    async def close(self) -> None:
        """Write what is left, if that can be done soon."""
        self._stop.set()
        self._news.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=CLOSE_S)
            self._task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        while not self._stop.is_set():
            await self._flush()
            if not self._asks_others:
                await self._news.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(until_tick(asyncio.get_running_loop().time(), self._flush_s)):
                    await self._stop.wait()
        await self._flush()

    async def _flush(self) -> None:
        since = day_of(self._wall_clock() - DAY_S)
        loop = asyncio.get_running_loop()
        self._news.clear()
        deltas = self._book.take()
        try:
            shared = await loop.run_in_executor(self._thread, add_counts, self._path, deltas, since)
        except Exception as error:  # whatever a disk can come up with: counting must go on
            self._book.put_back()
            self._news.set()
            if not self._is_failing:
                self._is_failing = True
                _logger.error(log.USAGE_UNWRITTEN, path=str(self._path), error=str(error))
            return
        self._is_failing = False
        self._book.written(shared)
