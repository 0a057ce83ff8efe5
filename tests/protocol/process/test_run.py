"""The runner of services in real processes: readiness, signals, exit codes, logs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

TIMEOUT_S = 30.0

PROGRAM = """
import asyncio, os, sys
import structlog
from microserve.protocol import log
from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.sources import load_settings
from microserve.protocol.process.run import run_service

sys.argv.append("bus.insecure=true")

async def serve(settings, bus, lifecycle):
    server = bus.server("tcp://127.0.0.1:0", lambda peer, frames: None)
    try:
        {body}
    finally:
        await asyncio.sleep(0)
        os.write(1, b"closed\\n")

sys.exit(run_service("index", load_settings(overrides=sys.argv[1:]), lambda: serve))
"""
SERVE = "lifecycle.ready(server.address); await asyncio.Event().wait()"


def start(body: str, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM.format(body=body), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_closes_the_service_cleanly(number: int) -> None:
    with start(SERVE) as process:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen += events(line)
            if seen[-1]["event"] == "service.ready":
                process.send_signal(number)
                break
        out, rest = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert out == "closed\n"
    seen += events(rest)
    assert [event["event"] for event in seen] == ["service.started", "service.ready", "service.stopped"]
    assert seen[1]["address"].startswith("tcp://127.0.0.1:")
    assert all(event["service"] == "index" and event["id"].startswith("i-") for event in seen)


def test_a_wrong_setting_exits_2_and_says_which() -> None:
    with start("raise ConfigError('index.max_mb must be larger', field='index.max_mb')") as process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out) == (2, "closed\n")
    failed = events(err)[-1]
    assert (failed["event"], failed["error"]) == ("service.failed", "index.max_mb must be larger")
    assert "exception" not in failed


def test_a_wrong_setting_inside_a_task_group_is_found() -> None:
    body = "async with asyncio.TaskGroup() as group: group.create_task(boom())"
    program = PROGRAM.replace(
        "async def serve", "async def boom():\n    raise ConfigError('bad')\nasync def serve"
    )
    command = [sys.executable, "-P", "-c", program.format(body=body)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 2


def test_a_crash_exits_1_with_its_traceback_in_the_log() -> None:
    with start("raise RuntimeError('out of luck')") as process:
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    failed = events(err)[-1]
    assert failed["event"] == "service.failed"
    assert "out of luck" in json.dumps(failed["exception"])


HANDLED = "import atexit; lifecycle.skips_exit_handlers = True; atexit.register(os.write, {fd}, b'handler'); "


@pytest.mark.parametrize("number", [1, 2], ids=["stdout", "stderr"])
def test_exit_handlers_are_skipped_also_where_nobody_reads_the_output(number: int) -> None:
    """A library's handler may wait for ever, and a reader of logs may be gone first."""
    with start(HANDLED.format(fd=3 - number) + SERVE) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stderr:
            if events(line)[-1]["event"] == "service.ready":
                break
        unread, read = process.stdout, process.stderr
        if number == 2:
            unread, read = read, unread
        unread.close()
        process.terminate()
        rest = read.read()
        # What a log cannot say is nobody's failure; what the service itself cannot write is.
        assert process.wait(TIMEOUT_S) == (1 if number == 1 else 0)
    assert "handler" not in rest


def test_missing_curve_keys_are_a_wrong_setting(tmp_path: Path) -> None:
    with start(SERVE, f"bus.curve_dir={tmp_path}") as process:
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2
    assert "microserve keys" in events(err)[-1]["error"]


def test_log_directory_gets_the_events_and_stderr_one_line(tmp_path: Path) -> None:
    with start("raise RuntimeError('out of luck')", f"log.dir={tmp_path}") as process:
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert err == "microserve index: out of luck\n"
    (file,) = tmp_path.glob("index-i-*.jsonl")
    assert [event["event"] for event in events(file.read_text())] == ["service.started", "service.failed"]


def test_systemd_hears_ready_watchdog_and_stopping(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(TIMEOUT_S)
        systemd = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "300000"}
        with start(SERVE, **systemd) as process:
            heard = [listening.recv(1000).decode() for _ in range(2)]
            process.terminate()
            process.communicate(timeout=TIMEOUT_S)
        listening.setblocking(False)
        while True:
            try:
                heard.append(listening.recv(1000).decode())
            except BlockingIOError:
                break
    assert heard[0].startswith("READY=1\nSTATUS=ready at tcp://127.0.0.1:")
    assert heard[1] == "WATCHDOG=1"
    assert heard[-1] == "STOPPING=1"


@pytest.mark.parametrize(
    "harm",
    [
        "asyncio.get_running_loop().call_soon(sys.exit, 3)",
        "asyncio.get_running_loop().call_later(0.01, sys.exit)",
        "asyncio.get_running_loop().stop()",
        "task = asyncio.create_task(leave())",
    ],
)
def test_nobody_ends_a_service_but_who_may(harm: str) -> None:
    """What a library or a strategy leaves in the loop; the service goes on, and stops when it is told to."""
    body = "\n        ".join(
        [
            "async def leave(): raise SystemExit(3)",
            "lifecycle.ready(server.address)",
            harm,
            "await asyncio.sleep(0.1)",
            "os.write(1, b'goes on\\n')",
            "await asyncio.Event().wait()",
        ]
    )
    with start(body) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "goes on\n"
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, output) == (0, "closed\n")
    assert "task.failed" in [event["event"] for event in events(errors)]
