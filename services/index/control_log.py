"""The log of all changes: SQLite, written through before anybody hears of a change (WIRE.md 6.4).

Owns the file, the versions and who did what when. What is in force is the fold of its rows, read once at the
start. One index at a time has the file; a killed one leaves each change either whole or absent.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from microserve.protocol import log
from microserve.protocol.errors import ConfigError, InternalError, InvalidRequest, MeshError
from microserve.protocol.messages.strategy.control import MAX_CONTROL_ENTRIES, Change, ControlRecord, Scalar
from microserve.protocol.messages.strategy.scores import Ramp
from microserve.services.index.control_state import Fold, digest_of

MAX_VERSION = 1 << 62
MAX_RECORDS = 1000
"""In one answer."""
RETRY_S = 1.0
"""Between two tries to open a log for which there is no room."""

_logger = structlog.get_logger()

_SCHEMA = """
CREATE TABLE IF NOT EXISTS changes (
    version INTEGER PRIMARY KEY,
    change_id TEXT NOT NULL UNIQUE,
    at REAL NOT NULL,
    who TEXT NOT NULL,
    kind TEXT NOT NULL,
    strategy TEXT NOT NULL,
    source TEXT NOT NULL,
    digest TEXT NOT NULL,
    parameters TEXT NOT NULL,
    share REAL NOT NULL,
    rolled_back INTEGER NOT NULL,
    reason TEXT NOT NULL
) STRICT
"""
_ADDED = {
    "shadow": "INTEGER NOT NULL DEFAULT 0",
    "max_ttft_s": "REAL NOT NULL DEFAULT 0",
    "max_tpot_s": "REAL NOT NULL DEFAULT 0",
    "engine": "TEXT NOT NULL DEFAULT ''",
    "labels": "TEXT NOT NULL DEFAULT '[]'",
    "sticky_by": "TEXT NOT NULL DEFAULT ''",
    "ramp": "TEXT NOT NULL DEFAULT 'null'",
}
"""Columns that came later: a log from before gets them when it is opened."""
_PARAMETERS = msgspec.json.Decoder(dict[str, Scalar])
_LABELS = msgspec.json.Decoder(list[str])
_RAMP = msgspec.json.Decoder(Ramp | None)


class ControlLog:
    """Append-only; ``fold`` is what is in force."""

    def __init__(self, path: str = "", *, wall_clock: Callable[[], float] = time.time) -> None:
        """``path`` empty: in memory only.

        Raises :class:`ConfigError` when the file cannot be had, is in use by another index, or does not fold;
        ``OSError`` when disk, memory or descriptors are used up, which passes.
        """
        self.fold = Fold()
        self.is_durable = bool(path)
        self._wall_clock = wall_clock
        try:
            self._database = sqlite3.connect(path or ":memory:", timeout=1.0, isolation_level=None)
        except sqlite3.Error as error:
            raise _failure(path, error) from None
        try:
            # Exclusive before the first read: WAL then needs no shared memory, and the lock ends with us.
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL"):
                self._database.execute(f"PRAGMA {pragma}")
            self._database.execute("BEGIN IMMEDIATE")
            self._database.execute(_SCHEMA)
            present = {row[1] for row in self._database.execute("PRAGMA table_info(changes)")}
            for column in [column for column in _ADDED if column not in present]:
                self._database.execute(f"ALTER TABLE changes ADD COLUMN {column} {_ADDED[column]}")
            self._database.execute("COMMIT")
            self._replay()
        except (sqlite3.Error, msgspec.MsgspecError, MeshError) as error:
            self._database.close()
            raise _failure(path, error) from None

    def _replay(self) -> None:
        columns = (
            "version, change_id, kind, strategy, source, parameters, share, rolled_back, shadow, reason, "
            "max_ttft_s, max_tpot_s, engine, labels, sticky_by, ramp"
        )
        for version, *row in self._database.execute(f"SELECT {columns} FROM changes ORDER BY version"):
            row[4], row[7], row[12] = _PARAMETERS.decode(row[4]), bool(row[7]), _LABELS.decode(row[12])
            row[14] = _RAMP.decode(row[14])
            self.fold = self.fold.after(Change(0, *row), version)

    def append(self, change: Change, who: str, *, above: int = 0) -> int:
        """Log a change; its version, which is higher than ``above``. It is on disk when this returns.

        A ``change_id`` that the log has is answered with its version. Raises :class:`InvalidRequest` for what
        cannot be applied, and :class:`InternalError` when the disk takes nothing; then nothing has changed.
        """
        try:
            known = self._database.execute(
                "SELECT version, kind, strategy, engine FROM changes WHERE change_id = ?", (change.change_id,)
            ).fetchone()
            if known is not None:
                if known[1:] != (change.kind, change.strategy, change.engine):
                    raise InvalidRequest("another change has this id", field="change_id")
                return int(known[0])
            version = max(self.fold.version, above) + 1
            fold = self.fold.after(change, version)
            row = {
                "version": version,
                "change_id": change.change_id,
                "at": self._wall_clock(),
                "who": who,
                "kind": change.kind,
                "strategy": change.strategy,
                "source": change.source,
                "digest": digest_of(change.source) if change.source else "",
                "parameters": msgspec.json.encode(change.parameters).decode(),
                "share": change.share,
                "rolled_back": change.version,
                "reason": change.reason,
                "shadow": change.shadow,
                "max_ttft_s": change.max_ttft_s,
                "max_tpot_s": change.max_tpot_s,
                "engine": change.engine,
                "labels": msgspec.json.encode(change.labels).decode(),
                "sticky_by": change.sticky_by,
                "ramp": msgspec.json.encode(change.ramp).decode(),
            }
            places = ",".join("?" * len(row))
            self._database.execute(
                f"INSERT INTO changes ({','.join(row)}) VALUES ({places})", list(row.values())
            )
        except (sqlite3.Error, UnicodeEncodeError) as error:
            raise InternalError(f"the control log took nothing: {error}") from None
        self.fold = fold
        return version

    def records(self, strategy: str = "", limit: int = MAX_CONTROL_ENTRIES) -> list[ControlRecord]:
        """The newest first; ``strategy`` empty: of all. At most ``MAX_RECORDS``. Raises
        :class:`InternalError` when the disk gives nothing."""
        columns = (
            "version, at, who, kind, strategy, digest, parameters, share, reason, engine, labels, shadow, "
            "ramp"
        )
        try:
            rows = self._database.execute(
                f"SELECT {columns} FROM changes WHERE ? IN ('', strategy) ORDER BY version DESC LIMIT ?",
                (strategy, max(0, min(limit, MAX_RECORDS))),
            ).fetchall()
        except sqlite3.Error as error:
            raise InternalError(f"the control log cannot be read: {error}") from None
        return [_record(*row) for row in rows]

    def close(self) -> None:
        self._database.close()


async def open_control_log(path: str) -> ControlLog:
    """Where the disk is full there will be room again, and nobody but who publishes needs this index until
    then.

    Raises :class:`ConfigError` for what does not pass."""
    is_told = False
    while True:
        try:
            return ControlLog(path)
        except OSError as error:
            if not is_told:
                is_told = True
                _logger.error(log.CONTROL_AWAITED, error=str(error))
            await asyncio.sleep(RETRY_S)


def _record(
    version: int,
    at: float,
    who: str,
    kind: str,
    strategy: str,
    digest: str,
    parameters: str,
    share: float,
    reason: str,
    engine: str,
    labels: str,
    shadow: int,
    ramp: str,
) -> ControlRecord:
    values, names = _PARAMETERS.decode(parameters), _LABELS.decode(labels)
    return ControlRecord(
        *(version, at, who, kind, strategy, digest, values, share, reason, engine, names, bool(shadow)),
        _RAMP.decode(ramp),
    )


def _failure(path: str, error: Exception) -> Exception:
    """Wrong for good, or for now: what the system says when it is asked itself tells the one from the
    other."""
    wrong = _unusable(path, error)
    if not isinstance(error, sqlite3.Error) or not path:
        return wrong
    if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM):
        return OSError(errno.ENOSPC, f"control log {path}: {error}")
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
    except OSError as refused:
        if refused.errno in (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM):
            return OSError(refused.errno, f"control log {path}: {refused.strerror}")
    return wrong


def _unusable(path: str, error: Exception) -> ConfigError:
    why = (_obstacle(Path(path)) if path else "") or str(error)
    return ConfigError(
        f"index.control_path: control log {path or 'in memory'}: {why}", field="index.control_path"
    )


def _obstacle(path: Path) -> str:
    """What SQLite leaves out; empty if it is something else."""
    if path.is_dir():
        return "is a directory"
    if not path.parent.is_dir():
        return f"there is no directory {path.parent}"
    if not os.access(path.parent, os.W_OK):  # its journal lies beside it
        return f"{path.parent} cannot be written by this user"
    return f"{path} cannot be written by this user" if path.exists() and not os.access(path, os.W_OK) else ""
