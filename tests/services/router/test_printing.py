"""A strategy that prints, warns, and leaves behind a task that fails: the router's log stays lines of
JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TIMEOUT_S = 60.0

STRATEGY = """
import asyncio, gc, sys, warnings
from microserve.services.router.authoring import strategy

print("printed when loaded")
print("to stderr", file=sys.stderr)
warnings.warn("a warning")

async def fail():
    raise ValueError("nobody awaits this")

async def leave_behind():
    task = asyncio.create_task(fail(), name="left behind")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    del task
    gc.collect()
    print("done", end="")
    sys.stdout.flush()

asyncio.get_running_loop().create_task(leave_behind())

@strategy
async def noisy(mesh, request):
    print("never asked")
    yield None
"""


def test_the_log_of_a_router_stays_json(tmp_path: Path) -> None:
    path = tmp_path / "noisy.py"
    path.write_text(STRATEGY)
    settings = [
        *(f'router.strategy_files=["{path}"]', "router.address=tcp://127.0.0.1:0"),
        *(
            "index.address=tcp://127.0.0.1:1",
            f"log.dir={tmp_path}",
            "log.file=router.jsonl",
            "bus.insecure=true",
        ),
    ]
    command = [sys.executable, "-P", "-m", "microserve.services", "router"]
    command += [word for each in settings for word in ("--set", each)]
    log = tmp_path / "router.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        deadline = time.monotonic() + TIMEOUT_S
        while not (
            log.exists() and b"task.failed" in log.read_bytes() and b"service.ready" in log.read_bytes()
        ):
            assert process.poll() is None and time.monotonic() < deadline, log.exists() and log.read_text()
            time.sleep(0.02)
        process.terminate()
        said, _ = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, said) == (0, b"")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    printed = [event["text"] for event in events if event["event"] == "process.printed"]
    assert printed[:2] == ["printed when loaded", "to stderr"]
    assert any("UserWarning: a warning" in text for text in printed)
    assert printed[-1] == "done"
    [failed] = [event for event in events if event["event"] == "task.failed"]
    assert (failed["task"], failed["exception"][0]["exc_value"]) == ("left behind", "nobody awaits this")
