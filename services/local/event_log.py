"""Reading JSON-lines event files while others write them.

Owns the position in each file; does not know what events mean. A line counts once its newline is there, so
a half-written one is read later; a truncated or replaced file is read again from its start.
"""

from __future__ import annotations

import heapq
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

Event = dict[str, Any]

_decode = msgspec.json.Decoder().decode


def parse_event(line: bytes, source: str = "") -> Event | None:
    """The event of one line; what is no JSON object becomes ``{"event": "", "text": ...}``.

    Such text is a native crash or a warning: too precious to lose. ``source`` (the file's stem) stands in
    for a missing service name. None for an empty line.
    """
    text = line.strip()
    if not text:
        return None
    try:
        event = _decode(text)
    except msgspec.DecodeError:
        event = None
    if not isinstance(event, dict):
        event = {"text": text.decode(errors="replace")}
    service, _, service_id = source.partition("-")
    event.setdefault("event", "")
    event.setdefault("service", service)
    event.setdefault("id", service_id)
    return event


class LogFile:
    """One file, read on from where the last read ended; survives truncation and rotation."""

    def __init__(self, path: Path, *, offset: int = 0) -> None:
        """``offset``: bytes of the present file to skip."""
        self.path = path
        self._skip = offset
        self._file: BinaryIO | None = None
        self._partial = b""
        self._last_ts = 0.0

    def read(self) -> Iterator[Event]:
        """Events whose lines are complete by now; nothing if the file is not there (yet)."""
        if self._file is None and not self._open(self._skip):
            return
        yield from self._rest()
        if self._rotated() and self._open(0):
            yield from self._rest()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, offset: int) -> bool:
        self.close()
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115  (kept open, so that rotation loses no line)
        except OSError:
            return False
        self._file.seek(offset)
        self._skip, self._partial = 0, b""
        return True

    def _rotated(self) -> bool:
        assert self._file is not None
        try:
            return os.stat(self.path).st_ino != os.fstat(self._file.fileno()).st_ino
        except OSError:
            return False  # moved away and not replaced yet: the old one may still be written

    def _rest(self) -> Iterator[Event]:
        file = self._file
        assert file is not None
        if os.fstat(file.fileno()).st_size < file.tell():
            file.seek(0)
            self._partial = b""
        for line in file:
            if not line.endswith(b"\n"):
                self._partial += line
                return
            event = parse_event(self._partial + line, self.path.stem)
            self._partial = b""
            if event is not None:
                yield self._stamped(event)

    def _stamped(self, event: Event) -> Event:
        """Text without a time belongs behind the line before it; without one, to when the file was
        written."""
        ts = event.get("ts")
        if not isinstance(ts, int | float):
            if not self._last_ts and self._file is not None:
                self._last_ts = os.fstat(self._file.fileno()).st_mtime
            event["ts"] = ts = self._last_ts
        self._last_ts = float(ts)
        return event


def last_error(path: Path, offset: int, *, max_nbytes: int = 32_768) -> str:
    """Why a process that logs to ``path`` ended: its last error event, else its last line of plain text.

    Looks at what follows ``offset``, and no further back than ``max_nbytes``. Empty if nothing says why.
    """
    try:
        with open(path, "rb") as file:
            nbytes = file.seek(0, os.SEEK_END)
            offset = 0 if offset > nbytes else offset  # another file by now: it was rotated
            begin = max(offset, nbytes - max_nbytes)
            file.seek(begin)
            lines = file.read().splitlines()[0 if begin == offset else 1 :]
    except OSError:
        return ""
    text = ""
    for event in filter(None, map(parse_event, reversed(lines))):
        if event.get("level") in ("error", "critical") and "error" in event:
            return str(event["error"])
        if event["event"] == "" and not text:
            text = event["text"]
    return text


class EventLog:
    """All ``*.jsonl`` files of a directory as one stream, and what was printed beside them (``*.out``)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[Path, LogFile] = {}

    def read(self) -> Iterator[Event]:
        """What is new since the last read, in order of time; files that have appeared are included."""
        for path in sorted([*self._directory.glob("*.jsonl"), *self._directory.glob("*.out")]):
            if path not in self._files:
                self._files[path] = LogFile(path)
        streams = [file.read() for file in self._files.values()]
        yield from heapq.merge(*streams, key=lambda event: event["ts"])

    def close(self) -> None:
        for file in self._files.values():
            file.close()


# --- systemd's journal ------------------------------------------------------------------------------

UNITS = "microserve-*"


class Unreadable(Exception):
    """There is no journal, or it may not be read; the text says why."""


class JournalLog:
    """The past, and with ``follow`` what comes, until :meth:`close`."""

    def __init__(self, *, follow: bool) -> None:
        command = ["journalctl", "--output=json", "--no-pager", "--all", "--quiet", f"--unit={UNITS}"]
        if follow:
            command += ["--follow", "--lines=all"]
        try:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except OSError as error:
            raise Unreadable(f"journalctl cannot be run: {error.strerror}") from None

    def read(self) -> Iterator[Event]:
        """Raises :class:`Unreadable` when the journal ends in an error."""
        assert self._process.stdout is not None and self._process.stderr is not None
        for line in self._process.stdout:
            event = _journal_event(line)
            if event is not None:
                yield event
        said = self._process.stderr.read().decode(errors="replace").strip()
        if self._process.wait() != 0:
            raise Unreadable(said or f"journalctl ended with {self._process.returncode}")

    def close(self) -> None:
        self._process.kill()
        with self._process:
            pass


def _journal_event(line: bytes) -> Event | None:
    try:
        entry = msgspec.json.decode(line, type=dict[str, object])
    except msgspec.MsgspecError:
        return None
    message = entry.get("MESSAGE")
    if isinstance(message, list):  # bytes that are no text, one by one
        message = bytes(each & 0xFF for each in message if isinstance(each, int)).decode(errors="replace")
    if not isinstance(message, str):
        return None
    unit = str(entry.get("_SYSTEMD_UNIT", "")).removesuffix(".service").removeprefix("microserve-")
    event = parse_event(message.encode(), unit.replace("@", "-"))
    if event is not None and not isinstance(event.get("ts"), int | float):
        stamp = str(entry.get("__REALTIME_TIMESTAMP", "0"))
        event["ts"] = int(stamp) / 1e6 if stamp.isdecimal() else 0.0
    return event
