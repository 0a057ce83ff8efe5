"""A service's log stands in nobody's way, and SIGHUP ends no service: real processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.protocol.process.test_run import PROGRAM, SERVE, TIMEOUT_S, events, start

pytestmark = pytest.mark.slow

FLOOD = (
    "lifecycle.ready(server.address)\n        for _ in range(20_000):\n"
    "            structlog.get_logger().info(log.REQUEST_FINISHED, padding='x' * 1000)\n"
    "            await asyncio.sleep(0)\n        "
)
"""20 MB; more than waits for a log."""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_reader_that_does_not_read_holds_nobody_up() -> None:
    """A full pipe, and nobody takes one byte from it."""
    with start(FLOOD) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "closed\n"
        assert process.wait(TIMEOUT_S) == 0
        assert 0 < len(process.stderr.read()) < 200_000


def test_a_process_without_stderr_serves() -> None:
    command = ["sh", "-c", 'exec "$0" -P -c "$1" 2>&-', sys.executable, PROGRAM.format(body=FLOOD)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=False)
    assert (done.returncode, done.stdout) == (0, "closed\n")


def test_a_disk_without_room_is_no_reason_to_end_and_what_was_lost_is_said(tmp_path: Path) -> None:
    """``/dev/full`` takes nothing; SIGHUP, once there is room for a file instead, opens that."""
    path = tmp_path / "log.jsonl"
    path.symlink_to("/dev/full")
    body = FLOOD + "os.write(1, b'flooded\\n'); await asyncio.Event().wait()"
    with start(body, f"log.dir={tmp_path}", "log.file=log.jsonl") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "flooded\n"
        path.unlink()
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: path.exists() and b"log.dropped" in path.read_bytes())
        process.terminate()
        assert process.wait(TIMEOUT_S) == 0
    found = [json.loads(line) for line in path.read_text().splitlines()]
    names = [event["event"] for event in found if event["event"] != "log.dropped"]
    assert names[:3] == ["service.started", "service.ready", "request.finished"], "they waited"
    assert names[-1] == "service.stopped"
    assert "settings.reloaded" in names
    told = [event for event in found if event["event"] == "log.dropped"]
    assert set(told[0]["reasons"]) == {"ENOSPC"}
    assert sum(event["count"] for event in told) + names.count("request.finished") == 20_000


def test_sighup_never_ends_a_service_and_reads_the_settings_again(tmp_path: Path) -> None:
    settings, log_file = tmp_path / "settings.toml", tmp_path / "log.jsonl"
    settings.write_text("[log]\nlevel = 'warning'\n")
    body = (
        "lifecycle.on_reload(lambda new: os.write(1, b'%d\\n' % new.index.max_mb)); os.write(1, b'up\\n'); "
        + SERVE
    )
    program = (
        PROGRAM.format(body=body)
        .replace("sys.exit(", "read = lambda: load_settings(sys.argv[1], overrides=sys.argv[2:])\nsys.exit(")
        .replace("load_settings(overrides=sys.argv[1:]), lambda: serve", "read(), lambda: serve, reload=read")
    )
    command = [sys.executable, "-P", "-c", program, str(settings)]
    command += [f"log.dir={tmp_path}", "log.file=log.jsonl"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        settings.write_text("[log]\nlevel = 'info'\n[index]\nmax_mb = 77\n")
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "77\n"
        wait_for(lambda: b"settings.reloaded" in log_file.read_bytes())
        log_file.rename(tmp_path / "moved")
        settings.write_text("[index]\nmax_mb = 'many'\n")
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: log_file.exists() and b"settings.rejected" in log_file.read_bytes())
        [rejected] = events(log_file.read_text())
        assert "index.max_mb" in rejected["error"]
        process.terminate()
        assert process.wait(TIMEOUT_S) == 0
    assert [event["event"] for event in events((tmp_path / "moved").read_text())] == ["settings.reloaded"]


def test_sighup_while_a_service_is_being_loaded_is_as_harmless() -> None:
    program = PROGRAM.replace("lambda: serve))", "lambda: os.kill(os.getpid(), 1) or serve))")
    command = [sys.executable, "-P", "-c", program.format(body="pass")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (done.returncode, done.stdout) == (0, "closed\n")


def test_what_a_service_prints_and_what_nobody_awaits_are_events(tmp_path: Path) -> None:
    body = (
        "print('a line'); asyncio.get_running_loop().call_soon(lambda: 1 / 0)\n"
        "        task = asyncio.create_task(boom(), name='left behind')\n"
        "        await asyncio.sleep(0); await asyncio.sleep(0); del task; import gc; gc.collect()\n"
        "        import warnings; warnings.warn('careful')\n"
    )
    program = PROGRAM.replace(
        "async def serve", "async def boom():\n    raise ValueError('lost')\nasync def serve"
    )
    command = [
        sys.executable,
        "-P",
        "-c",
        program.format(body=body),
        f"log.dir={tmp_path}",
        "log.file=x.jsonl",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n", "")
    found = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    printed = [event["text"] for event in found if event["event"] == "process.printed"]
    assert printed[0] == "a line"
    assert any("careful" in text for text in printed)
    failed = [event for event in found if event["event"] == "task.failed"]
    assert {event["task"]: event["exception"][0]["exc_type"] for event in failed} == {
        "": "ZeroDivisionError",
        "left behind": "ValueError",
    }


def test_the_soft_limit_of_descriptors_becomes_the_hard_one() -> None:
    body = "import resource; os.write(1, b'%d %d\\n' % resource.getrlimit(resource.RLIMIT_NOFILE))"
    command = ["sh", "-c", 'ulimit -Sn 100; ulimit -Hn 300; exec "$0" -P -c "$1"', sys.executable]
    done = subprocess.run(
        [*command, PROGRAM.format(body=body)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.stdout.splitlines() == ["300 300", "closed"], done.stderr
