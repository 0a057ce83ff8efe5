"""Engines of one world as real processes, which meet at a real index under CURVE; NVSHMEM is a stand-in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import pytest

from microserve.protocol import log
from microserve.protocol.bus.curve import create_keys
from tests.support.kvcache.heap.heap_child import PYTHONPATH, ROOT

TIMEOUT_S = 60.0


class Process:
    """One service that logs to its stderr."""

    def __init__(self, command: list[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
        self.popen = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.popen.stderr is not None
        self._stderr: IO[str] = self.popen.stderr
        self.lines: list[str] = []

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines if line.startswith("{")]

    def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The next event of that kind. The test's own time limit ends a wait for ever."""
        for line in self._stderr:
            self.lines.append(line)
            if line.startswith("{") and condition(event := json.loads(line)):
                return dict(event)
        raise AssertionError("".join(self.lines))

    def until_event(self, name: str) -> dict[str, Any]:
        return self.until(lambda event: event["event"] == name)

    def end(self) -> int:
        """Wait for its end; its exit status."""
        code = self.popen.wait(TIMEOUT_S)
        self.lines += self._stderr.readlines()
        return code

    @property
    def output(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.read()


class Mesh:
    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        create_keys(folder / "keys")
        self._common = [
            f"bus.curve_dir={folder / 'keys'}",
            f"index.address=ipc://{folder}/index",
            "bus.heartbeat_interval_s=0.05",
            "bus.liveness=100",
        ]
        flags = [part for each in self._common for part in ("--set", each)]
        self.index = self._start(["-m", "microserve.services", "index", *flags])
        self.index.until_event(log.SERVICE_READY)

    def engine(self, rank: int, mode: str = "serve", *overrides: str, num_ranks: int = 2) -> Process:
        settings = [
            *self._common,
            "engine.device=cuda:0",
            "kvcache.heap=nvshmem",
            "kvcache.grant_slots=2",
            "nvshmem.world=w",
            f"nvshmem.rank={rank}",
            f"nvshmem.num_ranks={num_ranks}",
            "nvshmem.memory_mb=1",
            *overrides,
        ]
        return self._start(["-m", "tests.support.engine.world_child", mode, str(self._folder), *settings])

    def _start(self, command: list[str]) -> Process:
        process = Process(command)
        self._stack.enter_context(process.popen)
        self._stack.callback(process.popen.kill)
        return process


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with ExitStack() as stack:
        yield Mesh(tmp_path, stack)


def failures(process: Process) -> list[str]:
    return [event["error"] for event in process.events if event["event"] == log.SERVICE_FAILED]


@pytest.mark.system
def test_a_rank_that_is_killed_is_proven_dead_and_its_lane_is_free(mesh: Mesh) -> None:
    owner, holder = mesh.engine(0), mesh.engine(1, "hold")
    names = [each.until_event(log.WORLD_JOINED)["name"] for each in (owner, holder)]
    assert names[0] == names[1]
    owner.until(lambda event: event.get("is_held") is True)

    holder.popen.kill()

    assert owner.until_event(log.RANK_LOST)["incarnation"] == holder.popen.pid
    owner.until(lambda event: event.get("is_held") is False)
    owner.popen.send_signal(signal.SIGTERM)
    assert owner.end() == 0
    for process in (owner, mesh.index):
        assert "capability" not in "".join(process.lines)


@pytest.mark.system
def test_a_rank_that_is_stopped_by_a_signal_holds_its_lane_and_is_not_dead(mesh: Mesh) -> None:
    owner, holder = mesh.engine(0), mesh.engine(1, "hold")
    owner.until(lambda event: event.get("is_held") is True)
    holder.popen.send_signal(signal.SIGSTOP)
    try:
        owner.popen.send_signal(signal.SIGTERM)
        assert owner.end() == 0, "nobody waits for a rank that cannot answer"
        assert not [event for event in owner.events if event["event"] == log.RANK_LOST]
        assert owner.events[-1]["event"] == log.SERVICE_STOPPED
        assert "exit handlers" not in owner.output, "a library's own could wait for the others"
    finally:
        holder.popen.send_signal(signal.SIGCONT)


@pytest.mark.system
def test_a_rank_alone_ends_with_one_line_at_its_deadline(mesh: Mesh) -> None:
    alone = mesh.engine(1, "serve", "nvshmem.join_timeout_s=1", num_ranks=3)
    assert alone.end() == 1
    assert failures(alone) == [
        "nvshmem.join_timeout_s: rank 1 is in no world w of 3 ranks after 1 s: "
        "of the ranks, [0, 2] have not come"
    ]
    assert "exit handlers" not in alone.output


@pytest.mark.system
def test_a_library_that_never_comes_back_ends_with_one_line_at_its_deadline(mesh: Mesh) -> None:
    stuck = mesh.engine(0, "stuck", "nvshmem.join_timeout_s=2", num_ranks=1)
    stuck.until_event("test.joining")
    assert stuck.end() == 1
    [failure] = failures(stuck)
    assert failure.endswith("all ranks were there, but NVSHMEM has not brought them together")
    assert "exit handlers" not in stuck.output


@pytest.mark.system
def test_a_library_that_holds_the_interpreter_is_ended_by_force(mesh: Mesh) -> None:
    deaf = mesh.engine(0, "deaf", "nvshmem.join_timeout_s=1", num_ranks=1)
    deaf.until_event("test.joining")
    assert deaf.end() == 1
    assert not failures(deaf)
    assert [line for line in deaf.lines if line.startswith("Timeout (0:00:0")]


@pytest.mark.system
def test_an_engine_that_waits_for_others_ends_when_it_is_told(mesh: Mesh) -> None:
    waiting = mesh.engine(0)
    assert waiting.until_event(log.WORLD_AWAITED)["present"] == [0]
    waiting.popen.send_signal(signal.SIGTERM)
    assert waiting.end() == 0
    assert waiting.events[-1]["event"] == log.SERVICE_STOPPED


@pytest.mark.system
def test_an_engine_inside_of_the_library_ends_when_it_is_told(mesh: Mesh) -> None:
    stuck = mesh.engine(0, "stuck", num_ranks=1)
    stuck.until_event("test.joining")
    stuck.popen.send_signal(signal.SIGTERM)
    assert stuck.end() == 0
    assert stuck.events[-1]["event"] == log.SERVICE_STOPPED
    assert "exit handlers" not in stuck.output


@pytest.mark.system
def test_a_second_engine_of_one_rank_ends_with_the_reason(mesh: Mesh) -> None:
    first = mesh.engine(1)
    first.until_event(log.WORLD_AWAITED)
    second = mesh.engine(1)
    assert second.end() == 1
    [failure] = failures(second)
    assert failure.startswith("rank 1 of world w is claimed by two living engines")
    mesh.engine(0)
    first.until_event(log.SERVICE_READY)
