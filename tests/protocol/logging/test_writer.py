"""The log's queue and thread: whatever a sink does, callers neither wait nor fail, and each line is
counted."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from microserve.protocol.logging.sampling import Sampler
from microserve.protocol.logging.writer import Writer

TIMEOUT_S = 20.0


class Disk:
    """Takes bytes, or not, as the test says."""

    def __init__(self) -> None:
        self.taken = bytearray()
        self.files: list[bytes] = []
        self.error = 0
        self.room: int | None = None
        self.blocked: threading.Event | None = None
        self.tries = threading.Semaphore(0)

    def write(self, data: bytes, *, at_line: bool) -> int:
        self.tries.release()
        if self.blocked is not None:
            self.blocked.wait(TIMEOUT_S)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        if self.room is not None:
            if self.room == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = data[: self.room]
            self.room -= len(data)
        self.taken += data
        return len(data)

    def reopen(self) -> None:
        self.files.append(bytes(self.taken))
        self.taken.clear()

    def close(self) -> None:
        pass

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.taken.splitlines()]


def make_line(event: str, fields: dict[str, Any]) -> bytes:
    return json.dumps({"event": event, **fields}).encode() + b"\n"


def writer_for(disk: Disk, **bounds: Any) -> Writer:
    return Writer(disk, Sampler(10), make_line, retry_s=0.001, **bounds)


def put(writer: Writer, *numbers: int) -> None:
    for number in numbers:
        writer.put("e", make_line("e", {"n": number}))


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EMFILE, errno.ENOMEM, errno.EPIPE])
def test_lines_wait_for_a_sink_that_fails_and_what_has_no_room_is_counted_and_said(error: int) -> None:
    disk = Disk()
    disk.error = error
    writer = writer_for(disk, max_lines=10)
    put(writer, 0)
    assert disk.tries.acquire(timeout=TIMEOUT_S) and disk.tries.acquire(timeout=TIMEOUT_S)
    put(writer, *range(1, 31))  # the first is with the thread: ten wait, twenty find no room
    disk.error = 0
    assert writer.flush(TIMEOUT_S)
    put(writer, 31)
    assert writer.close(TIMEOUT_S)
    found = disk.lines()
    assert [line["n"] for line in found if line["event"] == "e"] == [*range(11), 31]
    [told] = [line for line in found if line["event"] == "log.dropped"]
    name = errno.errorcode[error]
    assert (told["count"], told["reasons"], told["events"]) == (20, {name: 20}, {"e": 20})
    assert dict(writer.dropped) == {name: 20}


def cut(disk: Disk, writer: Writer) -> None:
    """The disk is full within the second of five lines."""
    disk.room = 25
    put(writer, *range(5))
    for _ in range(3):
        assert disk.tries.acquire(timeout=TIMEOUT_S)
    assert len(disk.taken) == 25


def test_a_line_cut_by_a_full_disk_goes_on_where_it_was_cut() -> None:
    disk = Disk()
    writer = writer_for(disk)
    cut(disk, writer)
    disk.room = None
    assert writer.close(TIMEOUT_S)
    assert [line["n"] for line in disk.lines()] == [0, 1, 2, 3, 4]


def test_a_cut_line_is_whole_in_a_file_that_was_opened_meanwhile() -> None:
    disk = Disk()
    writer = writer_for(disk)
    cut(disk, writer)
    writer.reopen()
    disk.room = None
    assert writer.close(TIMEOUT_S)
    assert disk.files == [(make_line("e", {"n": 0}) + make_line("e", {"n": 1}))[:25]]
    assert [line["n"] for line in disk.lines()] == [1, 2, 3, 4]


def test_who_logs_does_not_wait_for_a_sink_that_blocks_nor_does_the_end() -> None:
    disk = Disk()
    disk.blocked = threading.Event()
    writer = writer_for(disk, max_nbytes=1000)
    put(writer, 0)
    assert disk.tries.acquire(timeout=TIMEOUT_S)
    put(writer, *range(1, 1000))
    assert not writer.close(0.05)
    assert sum(writer.dropped.values()) == 1000
    disk.blocked.set()


def test_a_thread_that_cannot_be_started_is_tried_again_with_the_next_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    disk = Disk()
    writer = writer_for(disk)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        put(writer, 0)
    put(writer, 1)
    assert writer.close(TIMEOUT_S)
    assert [line["n"] for line in disk.lines()] == [0, 1]


def test_after_a_fork_both_sides_write_and_nothing_twice() -> None:
    read, write = os.pipe()

    class Pipe(Disk):
        def write(self, data: bytes, *, at_line: bool) -> int:
            return os.write(write, data)

    writer = writer_for(Pipe())
    put(writer, 0)
    assert writer.flush(TIMEOUT_S)
    with writer._changed:  # the child must not find it locked for ever
        pid = os.fork()
        if pid == 0:
            put(writer, 1)
            os._exit(0 if writer.flush(TIMEOUT_S) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    put(writer, 2)
    assert writer.close(TIMEOUT_S)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert sorted(json.loads(line)["n"] for line in pipe) == [0, 1, 2]


def test_many_threads_lose_no_line_and_cut_none() -> None:
    disk = Disk()
    writer = writer_for(disk)
    threads = [
        threading.Thread(target=put, args=(writer, *range(base, base + 500))) for base in range(0, 4000, 500)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writer.close(TIMEOUT_S)
    assert sorted(line["n"] for line in disk.lines()) == list(range(4000))


def test_what_is_logged_while_this_thread_has_the_queue_is_no_deadlock() -> None:
    """The collector may run anything, anywhere: a destructor that logs, within a log call."""
    disk = Disk()
    writer = writer_for(disk)
    with writer._changed:
        put(writer, 0, 1)
    assert writer.close(TIMEOUT_S)
    assert [line["n"] for line in disk.lines()] == [0, 1]


@pytest.mark.parametrize("call", [lambda w: put(w, 1), lambda w: w.reopen(), lambda w: w.flush(0.01)])
def test_after_the_end_nothing_raises_and_lines_are_counted(call: Callable[[Writer], Any]) -> None:
    writer = writer_for(Disk())
    put(writer, 0)
    assert writer.close(TIMEOUT_S)
    assert writer.close(TIMEOUT_S)
    call(writer)
    assert dict(writer.dropped) in ({}, {"closed": 1})


def test_lines_that_come_soon_after_others_wait_for_the_thread_to_look_again() -> None:
    """It is not woken for each; what asks for all of them is not kept waiting."""
    disk = Disk()
    writer = Writer(disk, Sampler(10), make_line)
    writer.put("e", make_line("e", {"n": 0}))
    with writer._changed:
        assert writer._changed.wait_for(lambda: writer._lingers, TIMEOUT_S)
        writer.put("e", make_line("e", {"n": 1}))
        assert len(writer._changed._waiters) == 1  # type: ignore[attr-defined]
    assert writer.flush(TIMEOUT_S)
    assert [line["n"] for line in disk.lines()] == [0, 1]
    writer.put("e", make_line("e", {"n": 2}))
    assert writer.close(TIMEOUT_S)
    assert [line["n"] for line in disk.lines()] == [0, 1, 2]
