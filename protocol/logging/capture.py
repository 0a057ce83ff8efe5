"""What anybody prints in a service becomes events, so that its log stays lines of JSON.

Owns ``sys.stdout``, ``sys.stderr`` and ``threading.excepthook`` while it lasts: a library that warns, a
strategy that prints, a thread that ends. What C code writes to the descriptors is not seen here.
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
from typing import Any, TextIO

import structlog

from microserve.protocol import log

MAX_LINE_NBYTES = 8192
"""A longer line is cut into several events."""

_logger = structlog.get_logger()


class _Lines(io.RawIOBase):
    """Bytes in, an event for each line."""

    def __init__(self, stream: str, descriptor: int) -> None:
        self._stream = stream
        self._descriptor = descriptor
        self._rest = b""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        """Of the true stream: whoever hands it to a process means that one."""
        return self._descriptor

    def write(self, data: Any) -> int:
        *lines, self._rest = (self._rest + bytes(data)).split(b"\n")
        while len(self._rest) > MAX_LINE_NBYTES:
            lines.append(self._rest[:MAX_LINE_NBYTES])
            self._rest = self._rest[MAX_LINE_NBYTES:]
        for line in lines:
            self._tell(line)
        return len(data)

    def tell_rest(self) -> None:
        rest, self._rest = self._rest, b""
        self._tell(rest)

    def _tell(self, line: bytes) -> None:
        for begin in range(0, len(line), MAX_LINE_NBYTES):
            text = line[begin : begin + MAX_LINE_NBYTES].decode(errors="backslashreplace")
            if text.strip():
                tell = _logger.warning if self._stream == "stderr" else _logger.info
                tell(log.PROCESS_PRINTED, stream=self._stream, text=text)


class Capture:
    """From :meth:`begin` to :meth:`end`."""

    def __init__(self) -> None:
        self._before: tuple[TextIO, TextIO] | None = None
        self._lines: list[_Lines] = []

    def begin(self) -> None:
        if self._before is not None:
            return
        self._before = (sys.stdout, sys.stderr)
        sys.stdout, sys.stderr = self._stream("stdout", 1), self._stream("stderr", 2)
        threading.excepthook = _thread_failed

    def _stream(self, name: str, descriptor: int) -> TextIO:
        lines = _Lines(name, descriptor)
        self._lines.append(lines)
        buffered = io.BufferedWriter(lines, MAX_LINE_NBYTES)
        return io.TextIOWrapper(
            buffered, encoding="utf-8", errors="backslashreplace", line_buffering=True, write_through=True
        )

    def end(self) -> None:
        """What was printed without an end of line is told as well."""
        if self._before is None:
            return
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(ValueError, OSError):  # somebody has closed it
                stream.flush()
        for lines in self._lines:
            lines.tell_rest()
        sys.stdout, sys.stderr = self._before
        threading.excepthook = threading.__excepthook__
        self._before, self._lines = None, []


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    name = failure.thread.name if failure.thread is not None else ""
    _logger.error(log.THREAD_FAILED, thread=name, exc_info=failure.exc_value)
