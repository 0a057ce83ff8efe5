"""A SQLite file of entries: put, found and thrown away in transactions, so that processes may share it.

Owns the bounds: behind every put there are no more entries, no more bytes and none that are older than
allowed, whoever has put them. Blocks: it is for a thread of its own.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

BUSY_S = 2.0
"""Longest wait for another process that writes."""

_SCHEMA = """
    CREATE TABLE IF NOT EXISTS entry (
        name TEXT NOT NULL, owner TEXT NOT NULL, at REAL NOT NULL,
        nbytes INTEGER NOT NULL, data BLOB NOT NULL,
        PRIMARY KEY (owner, name)
    );
    CREATE INDEX IF NOT EXISTS entry_at ON entry (at, nbytes);
    CREATE INDEX IF NOT EXISTS entry_owner ON entry (owner, name, nbytes);
    CREATE TABLE IF NOT EXISTS total (count INTEGER NOT NULL, nbytes INTEGER NOT NULL);
    INSERT INTO total SELECT 0, 0 WHERE NOT EXISTS (SELECT * FROM total);
    CREATE TRIGGER IF NOT EXISTS put AFTER INSERT ON entry BEGIN
        UPDATE total SET count = count + 1, nbytes = nbytes + NEW.nbytes;
    END;
    CREATE TRIGGER IF NOT EXISTS gone AFTER DELETE ON entry BEGIN
        UPDATE total SET count = count - 1, nbytes = nbytes - OLD.nbytes;
    END;
"""
_GO = """DELETE FROM entry WHERE rowid = (
    SELECT rowid FROM entry WHERE owner = (
        SELECT owner FROM entry WHERE NOT (owner = ? AND name = ?)
        GROUP BY owner ORDER BY {much} DESC, MIN(rowid) LIMIT 1
    ) AND NOT (owner = ? AND name = ?) ORDER BY at, rowid LIMIT 1
)"""


@dataclass(frozen=True, slots=True)
class Bounds:
    max_nbytes: int
    max_count: int
    max_age_s: float


class Shelf:
    """Open it in the thread that uses it; ``close`` it there. Every method raises ``OSError`` or
    ``sqlite3.Error``, and has changed nothing then."""

    def __init__(self, path: Path, bounds: Bounds) -> None:
        self._bounds = bounds
        # It holds what people have said: for its owner's eyes alone.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        self._database = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
        try:
            self._share()
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute("PRAGMA secure_delete = ON")
            self._database.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
        except BaseException:
            self._database.close()
            raise

    def _share(self) -> None:
        """Readers beside a writer. Of several who open a new file at once SQLite refuses some at once."""
        ends_at = time.monotonic() + BUSY_S
        while True:
            try:
                self._database.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError:
                if time.monotonic() > ends_at:
                    raise
            time.sleep(0.01)

    def put(self, owner: str, name: str, data: bytes, now: float) -> None:
        """An entry that is larger than all may be is none."""
        if len(data) > self._bounds.max_nbytes:
            return
        with _Writing(self._database):
            self._database.execute("DELETE FROM entry WHERE owner = ? AND name = ?", (owner, name))
            entry = (name, owner, now, len(data), data)
            self._database.execute("INSERT INTO entry VALUES (?, ?, ?, ?, ?)", entry)
            self._database.execute("DELETE FROM entry WHERE at <= ?", (now - self._bounds.max_age_s,))
            self._make_room(owner, name)

    def _make_room(self, owner: str, name: str) -> None:
        """Down to what may be: the oldest go of whoever has most, so that nobody pushes others' out; what has
        just been put does not."""
        while True:
            [(count, nbytes)] = self._database.execute("SELECT count, nbytes FROM total").fetchall()
            if nbytes > self._bounds.max_nbytes:
                self._database.execute(_GO.format(much="SUM(nbytes)"), (owner, name) * 2)
            elif count > self._bounds.max_count:
                self._database.execute(_GO.format(much="COUNT(*)"), (owner, name) * 2)
            else:
                return

    def get(self, owner: str, name: str, now: float) -> bytes | None:
        found = self._database.execute(
            "SELECT data FROM entry WHERE owner = ? AND name = ? AND at > ?",
            (owner, name, now - self._bounds.max_age_s),
        )
        with closing(found):
            row = found.fetchone()
        return None if row is None else row[0]

    def delete(self, owner: str, name: str) -> bool:
        """Whether it was there."""
        with _Writing(self._database):
            found = self._database.execute("DELETE FROM entry WHERE owner = ? AND name = ?", (owner, name))
            return found.rowcount > 0

    def close(self) -> None:
        self._database.close()


class _Writing:
    """One transaction, which waits for other processes' at its begin and not in its middle."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def __enter__(self) -> None:
        self._database.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._database.execute("COMMIT" if kind is None else "ROLLBACK")
