"""The bounded queue of lines, and the one thread that writes them.

Owns what waits, what was dropped and why, and the thread. Whoever hands a line over neither waits nor sees an
error: a full disk, a pipe that nobody reads and a missing descriptor all look the same to it. Lines wait
while nothing can be written, up to the queue's bounds; beyond them the newest are counted, and the count is a
line of its own (``log.dropped``) when there is room again.

After a fork the child begins with an empty queue and, with its first line, a thread of its own.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from microserve.protocol import log
from microserve.protocol.logging.sampling import Key, Sampler
from microserve.protocol.logging.sink import Sink

MAX_LINES = 20_000
MAX_NBYTES = 8 << 20
"""Of lines that wait; either bound."""
BATCH_NBYTES = 64 << 10
LINGER_S = 0.02
"""Lines that come so soon after others were written wait until then: to wake a thread costs more than a
line, and who logs has to give it the interpreter."""
RETRY_S = 0.25
"""Between two tries while nothing can be written."""
TELL_S = 1.0
"""``log.dropped`` and ``log.sampled`` are written so often at most."""
MAX_EVENTS_TOLD = 8

QUEUE_FULL = "queue_full"
CLOSED = "closed"

MakeLine = Callable[[str, dict[str, Any]], bytes]
"""An event of the log's own, as a line."""


class Writer:
    def __init__(
        self,
        sink: Sink,
        sampler: Sampler,
        make_line: MakeLine,
        *,
        max_lines: int = MAX_LINES,
        max_nbytes: int = MAX_NBYTES,
        retry_s: float = RETRY_S,
    ) -> None:
        self.sink = sink
        self.dropped: Counter[str] = Counter()
        """Lines that were not written, by reason: the name of an errno, ``queue_full``, ``closed`` ..."""
        self._sampler = sampler
        self._make_line = make_line
        self._max_lines = max_lines
        self._max_nbytes = max_nbytes
        self._retry_s = retry_s
        self._begin()
        _writers.add(self)

    def _begin(self) -> None:
        # An RLock: the collector may run a destructor that logs while this very thread has it.
        self._changed = threading.Condition(threading.RLock())
        self._lines: deque[tuple[str, bytes]] = deque()
        self._nbytes = 0
        self._batch: list[tuple[str, bytes]] = []
        self._data = b""
        self._done = 0
        self._failing = ""
        self._untold_reasons: Counter[str] = Counter()
        self._untold_events: Counter[str] = Counter()
        self._told_at = float("-inf")
        self._reopen_due = False
        self._closing = False
        self._deadline = 0.0
        self._lingers = False
        """The thread looks again within ``LINGER_S``, unasked."""
        self._thread: threading.Thread | None = None

    # --- for everybody ---------------------------------------------------------------------------

    def put(self, event: str, line: bytes) -> None:
        """Never raises, never waits."""
        with self._changed:
            if self._closing:
                self._count(event, CLOSED)
            elif len(self._lines) >= self._max_lines or self._nbytes + len(line) > self._max_nbytes:
                self._count(event, self._failing or QUEUE_FULL)
            else:
                self._lines.append((event, line))
                self._nbytes += len(line)
            if not self._lingers:
                self._wake()

    def drop(self, event: str, reason: str) -> None:
        """A line that could not even be made."""
        with self._changed:
            self._count(event, reason)
            self._wake()

    def admit(self, key: Key) -> bool:
        """See :meth:`Sampler.admit`."""
        with self._changed:
            admitted = self._sampler.admit(key, time.monotonic())
            if not admitted:
                self._wake()
            return admitted

    def reopen(self) -> None:
        """With the next line: somebody has moved the file away."""
        with self._changed:
            self._reopen_due = True
            self._wake()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was handed over is written; False if it is not by then."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._wake()
            while self._lines or self._batch:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or self._thread is None or self._thread is threading.current_thread():
                    return False
                self._changed.wait(left_s)
        return True

    def close(self, timeout_s: float) -> bool:
        """Write what is there, for at most ``timeout_s``, and end. False if something was not written."""
        with self._changed:
            if self._closing and self._thread is None:
                return True
            self._closing = True
            self._deadline = time.monotonic() + timeout_s
            self._wake()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)
        with self._changed:
            left = [*self._batch, *self._lines]
            for event, _ in left:
                self._count(event, self._failing or CLOSED)
            self._lines.clear()
            self._thread = None
        if thread is None or not thread.is_alive():  # else it stands in a write
            self._batch = []
            self.sink.close()
        return not left

    def _count(self, event: str, reason: str) -> None:
        self.dropped[reason] += 1
        self._untold_reasons[reason] += 1
        self._untold_events[event] += 1

    def _wake(self) -> None:
        if self._thread is None and not (self._closing and not self._lines):
            thread = threading.Thread(target=self._run, name="log", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no memory for one now, or the interpreter ends; the next line tries again
                return
            self._thread = thread
        self._changed.notify_all()

    # --- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        changed = self._changed
        while True:
            with changed:
                while not self._take(time.monotonic()):
                    if self._closing:
                        return
                    waits_for_time = self._sampler.is_due or bool(self._untold_reasons)
                    changed.wait(TELL_S if waits_for_time else None)
            try:
                self._write()
            except Exception as error:
                with changed:
                    self._failing = _reason(error)
                    left_s = self._deadline - time.monotonic() if self._closing else self._retry_s
                    if left_s <= 0:
                        return
                    changed.wait(min(left_s, self._retry_s))
                    continue
            with changed:
                self._failing, self._batch, self._data, self._done = "", [], b"", 0
                changed.notify_all()
                if not (self._closing or self._reopen_due or self._lines):
                    self._lingers = True
                    changed.wait(LINGER_S)
                    self._lingers = False

    def _take(self, now: float) -> bool:
        """Choose what is written next, unless something still is; False if there is nothing."""
        if self._batch or self._reopen_due:
            return True
        self._tell(now)
        nbytes = 0
        while self._lines and nbytes < BATCH_NBYTES:
            self._batch.append(self._lines.popleft())
            nbytes += len(self._batch[-1][1])
        self._nbytes = self._nbytes - nbytes if self._lines else 0
        self._data, self._done = b"".join(line for _, line in self._batch), 0
        return bool(self._batch)

    def _tell(self, now: float) -> None:
        """Lines about lines that are missing: in front of those that are written after them."""
        if now - self._told_at < TELL_S and not self._closing:
            return
        told: list[tuple[str, bytes]] = []
        for key, count in self._sampler.take_due(now, all_of_it=self._closing):
            of = {"of": key.event, "status": key.status, "reason": key.reason, "left_out": count}
            told.append((log.LOG_SAMPLED, self._make_line(log.LOG_SAMPLED, of)))
        if self._untold_reasons:
            fields: dict[str, Any] = {
                "count": sum(self._untold_reasons.values()),
                "reasons": dict(self._untold_reasons),
                "events": dict(self._untold_events.most_common(MAX_EVENTS_TOLD)),
            }
            told.append((log.LOG_DROPPED, self._make_line(log.LOG_DROPPED, fields)))
            self._untold_reasons.clear()
            self._untold_events.clear()
        if told:
            self._told_at = now
            self._batch += told

    def _write(self) -> None:
        if self._reopen_due:
            self._reopen_due = False
            # The rest of a line would be no line in another file.
            self._done = self._data.rfind(b"\n", 0, self._done) + 1
            self.sink.reopen()
        while self._done < len(self._data):
            at_line = self._done == 0 or self._data[self._done - 1 : self._done] == b"\n"
            self._done += self.sink.write(self._data[self._done :], at_line=at_line)
            with self._changed:
                if self._closing and time.monotonic() > self._deadline:
                    raise TimeoutError(errno.ETIMEDOUT, "the log was closed before it was written")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return errno.errorcode.get(error.errno, str(error.errno))
    return type(error).__name__


_writers: weakref.WeakSet[Writer] = weakref.WeakSet()


def _after_fork() -> None:
    for writer in list(_writers):
        writer._begin()


os.register_at_fork(after_in_child=_after_fork)
