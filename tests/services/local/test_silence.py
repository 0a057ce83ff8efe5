"""Children that make no progress are killed and started again; nobody is for what stood still as a whole."""

from __future__ import annotations

import configparser
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol import log
from microserve.protocol.settings.settings import MeshSettings
from microserve.services.local.composition import ENGINE_PATIENCE
from microserve.services.local.notice import Silence
from microserve.services.local.supervisor import ChildState
from tests.services.local.test_supervisor import READY, TIMEOUT_S, Watched, child, run

LIMIT_S = 1.2
PROGRESS = READY + "import time\nwhile True:\n    notify.send(b'WATCHDOG=1')\n    time.sleep(0.1)"
HANGS = READY + "import time\nwhile True: time.sleep(1)"
WELL_THEN_STUCK = PROGRESS.replace("while True", "for _ in range(5)") + "\nsignal.pause()"


@pytest.mark.parametrize("script", [HANGS, WELL_THEN_STUCK])
def test_a_child_without_progress_is_killed_and_started_again(tmp_path: Path, script: str) -> None:
    async def test() -> None:
        watched = Watched(
            [
                child(tmp_path, "stuck", script, watchdog_s=LIMIT_S),
                child(tmp_path, "well", PROGRESS, watchdog_s=LIMIT_S),
                child(tmp_path, "unwatched", HANGS),
            ]
        )
        stuck, well, unwatched = watched.children
        with structlog.testing.capture_logs() as logs:
            async with watched.supervisor:
                await watched.supervisor.ready()
                first = stuck.pid
                await watched.until(lambda: stuck.restarts == 1 and stuck.state is ChildState.READY)
                assert stuck.pid != first
                assert (well.restarts, unwatched.restarts) == (0, 0)
        [told] = [
            entry for entry in logs if entry["event"] == log.CHILD_STUCK and entry["child_pid"] == first
        ]
        assert (told["child"], told["child_pid"], told["error"]) == (
            "stuck",
            first,
            f"killed: no progress for {LIMIT_S:g} s",
        )

    run(test())


def test_a_frozen_child_is_started_again(tmp_path: Path) -> None:
    async def test() -> None:
        watched = Watched([child(tmp_path, "a", PROGRESS, watchdog_s=LIMIT_S)])
        [frozen] = watched.children
        async with watched.supervisor:
            await watched.supervisor.ready()
            os.kill(frozen.pid, signal.SIGSTOP)
            await watched.until(lambda: frozen.restarts == 1 and frozen.state is ChildState.READY)

    run(test())


ALONE = f"""
import asyncio, pathlib, sys, json
from microserve.services.local.supervisor import Child, Supervisor
async def main(directory):
    argv = [sys.executable, "-S", "-c", {PROGRESS!r}]
    here = pathlib.Path(directory)
    children = [Child("a", argv, here / "a.jsonl", here / "a.out", watchdog_s={LIMIT_S})]
    async with Supervisor(children, max_restarts=9, restart_window_s=9, ready_timeout_s=30) as supervisor:
        await supervisor.ready()
        print(json.dumps(children[0].pid), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        await asyncio.sleep({3 * LIMIT_S})
        print(json.dumps(children[0].pid), flush=True)
asyncio.run(main(sys.argv[1]))
"""


def line_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(json.loads(next(text for text in process.stdout if text.strip().isdecimal())))


@pytest.mark.parametrize("first", ["supervisor", "child"])
def test_a_mesh_that_was_stopped_as_a_whole_goes_on_as_it_was(tmp_path: Path, first: str) -> None:
    """Whoever thaws first."""
    command = [sys.executable, "-P", "-c", ALONE, str(tmp_path)]
    pipes = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipes, stdout=pipes, stderr=subprocess.DEVNULL, text=True) as alone:
        assert alone.stdin is not None
        pid = line_of(alone)
        processes = [psutil.Process(alone.pid), psutil.Process(pid)]
        for each in processes:
            each.suspend()
        time.sleep(3 * LIMIT_S)  # the time for which all is stopped is what is tested
        for each in processes if first == "supervisor" else reversed(processes):
            each.resume()
            time.sleep(LIMIT_S / 3)
        print(file=alone.stdin, flush=True)
        assert line_of(alone) == pid
        assert alone.wait(TIMEOUT_S) == 0


@given(st.lists(st.tuples(st.floats(0, 10), st.sampled_from(["hear", "look"])), max_size=60).map(sorted))
def test_silence_against_its_definition(events: list[tuple[float, str]]) -> None:
    """Silent is who has not been heard for its limit, during all of which somebody listened."""
    silence, heard, looks = Silence(), 0.0, [0.0]
    silence.expect(7, 3.0, 0.0)
    silence.expect(8, 0.0, 0.0)
    for now, event in events:
        if event == "hear":
            silence.hear(7, now)
            heard = now
            continue
        gaps = [(a, b) for a, b in zip(looks, [*looks[1:], now], strict=True) if b - a > 2 * silence.look_s]
        looks.append(now)
        listened_since = max([heard, *(end for _, end in gaps)])
        assert silence.look(now) == ([7] if now - listened_since > 3.0 else [])


def test_whoever_leaves_is_missed_by_nobody() -> None:
    silence = Silence()
    silence.expect(7, 0.5, 0.0)
    silence.forget(7)
    assert silence.look(0.6) == []


@pytest.mark.parametrize("service", ["index", "router", "gateway", "engine@"])
def test_systemd_waits_as_long_as_up_does(service: str) -> None:
    units = Path(__file__).parents[3] / "deploy" / "systemd"
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.read(units / f"microserve-{service}.service")
    patience = ENGINE_PATIENCE if service == "engine@" else 1
    assert float(unit["Service"]["WatchdogSec"]) == MeshSettings().watchdog_s * patience
