"""Where lines go: a file that is rotated by size and can be reopened, or an open stream.

Owns descriptors, names and sizes; used by the writer's thread only. Raises ``OSError`` freely: whoever writes
keeps what was not taken and comes back. Does not know what a line says.
"""

from __future__ import annotations

import contextlib
import os
import select
from pathlib import Path
from typing import Protocol, TextIO

READY_MS = 1000
"""A stream that takes nothing is looked at so often."""


class Sink(Protocol):
    def write(self, data: bytes, *, at_line: bool) -> int:
        """Bytes taken. ``at_line``: they begin a line, so that a new file may begin with them."""
        ...

    def reopen(self) -> None:
        """By the same name, with the next write: somebody has moved the file away."""
        ...

    def close(self) -> None: ...


class FileSink:
    """Appends to ``path``; beyond ``max_nbytes`` it becomes ``path.1``, that ``path.2``, up to ``keep``."""

    def __init__(self, path: Path, *, max_nbytes: int, keep: int) -> None:
        """``max_nbytes`` 0: it grows. Opens nothing yet."""
        self.path = path
        self.max_nbytes = max_nbytes
        self.keep = keep
        self._descriptor = -1
        self._nbytes = 0

    def write(self, data: bytes, *, at_line: bool) -> int:
        if self._descriptor >= 0 and os.fstat(self._descriptor).st_nlink == 0:
            self.reopen()  # deleted under us: nobody would ever read it
        if self._descriptor < 0:
            self._open()
        if at_line and self.max_nbytes and self._nbytes and self._nbytes + len(data) > self.max_nbytes:
            self._rotate()
        taken = os.write(self._descriptor, data)
        self._nbytes += taken
        return taken

    def reopen(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.reopen()

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self.path, flags, 0o644)
        try:
            self._nbytes = os.fstat(descriptor).st_size
            # A life before may have ended within a line.
            if self._nbytes and os.pread(descriptor, 1, self._nbytes - 1) != b"\n":
                self._nbytes += os.write(descriptor, b"\n")
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def _rotate(self) -> None:
        """Closed first: then there is a descriptor for the new one, however few there are."""
        self._nbytes = 0  # a directory that lets nothing be moved is tried again that much later
        if self.keep == 0:
            os.ftruncate(self._descriptor, 0)
            return
        try:
            shift(self.path, self.keep)
        except OSError:
            return
        self.reopen()
        self._open()


def shift(path: Path, keep: int) -> None:
    """``path`` becomes ``path.1``, and that ``path.2``, up to ``keep``; what is not there is no error."""
    for number in range(keep - 1, 0, -1):
        with contextlib.suppress(FileNotFoundError):
            os.replace(f"{path}.{number}", f"{path}.{number + 1}")
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, f"{path}.1")


class DescriptorSink:
    """An open descriptor that is not ours to close, such as that of stderr."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: bytes, *, at_line: bool) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # somebody shares it and has made it so
            poll = select.poll()
            poll.register(self._descriptor, select.POLLOUT)
            poll.poll(READY_MS)
            return 0

    def is_ready(self) -> bool:
        """It would take something at once."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        return any(events & select.POLLOUT for _, events in poll.poll(0))

    def reopen(self) -> None:
        pass

    def close(self) -> None:
        pass


class TextSink:
    """A text stream without a descriptor."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, data: bytes, *, at_line: bool) -> int:
        self._stream.write(data.decode(errors="backslashreplace"))
        self._stream.flush()
        return len(data)

    def reopen(self) -> None:
        pass

    def close(self) -> None:
        pass
