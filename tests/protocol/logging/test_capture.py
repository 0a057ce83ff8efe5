"""What a service prints is lines of JSON in its log: a strategy's ``print``, a warning, a thread's end."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from microserve.protocol.logging.setup import Log, configure
from microserve.protocol.settings.settings import LogSettings


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[tuple[Log, Path]]:
    log = configure("router", "r0", LogSettings(dir=str(tmp_path), max_refusals_per_s=1000))
    yield log, tmp_path / "router-r0.jsonl"
    log.close()
    structlog.reset_defaults()


def printed(log: Log, path: Path) -> list[dict[str, Any]]:
    log.close()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_become_events_whoever_writes_them_and_however(log_file: tuple[Log, Path]) -> None:
    log, path = log_file
    log.capture()
    print("one")
    print("two\nthree", file=sys.stderr)
    sys.stdout.write("fo")
    sys.stdout.write("ur\n")
    sys.stdout.buffer.write(b"five \xff\n")
    sys.stdout.flush()
    print("six, and no end", end="")
    found = printed(log, path)
    texts = [(line["stream"], line["text"]) for line in found if line["event"] == "process.printed"]
    assert texts == [
        ("stdout", "one"),
        ("stderr", "two"),
        ("stderr", "three"),
        ("stdout", "four"),
        ("stdout", "five \\xff"),
        ("stdout", "six, and no end"),
    ]


def test_an_endless_line_is_cut(log_file: tuple[Log, Path]) -> None:
    log, path = log_file
    log.capture()
    print("x" * 100_000)
    texts = [line["text"] for line in printed(log, path)]
    assert "".join(texts) == "x" * 100_000
    assert max(map(len, texts)) <= 8192


def test_a_thread_that_ends_by_an_error_is_an_event(log_file: tuple[Log, Path]) -> None:
    log, path = log_file
    log.capture()

    def fail() -> None:
        raise ValueError("lost")

    thread = threading.Thread(target=fail, name="a strategy's")
    thread.start()
    thread.join()
    [line] = printed(log, path)
    assert (line["event"], line["thread"]) == ("thread.failed", "a strategy's")
    assert line["exception"][0]["exc_value"] == "lost"


def test_streams_are_as_before_afterwards(tmp_path: Path) -> None:
    before = sys.stdout, sys.stderr
    log = configure("router", "r0", LogSettings(dir=str(tmp_path)))
    log.capture()
    assert sys.stdout is not before[0]
    assert sys.stderr.fileno() == 2
    log.close()
    structlog.reset_defaults()
    assert (sys.stdout, sys.stderr) == before
