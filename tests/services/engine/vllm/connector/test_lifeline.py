"""Real processes: whoever starts vLLM's takes them along."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import subprocess
import sys
from multiprocessing.connection import Connection

import pytest

from microserve.services.engine.vllm.connector.lifeline import end_with_parent

pytestmark = pytest.mark.slow


def engine_core(front: Connection) -> None:
    """As vLLM does it: starts a worker of its own."""
    end_with_parent()
    context = multiprocessing.get_context("spawn")
    worker_end, end = context.Pipe()
    worker = context.Process(target=worker_process, args=(end,))
    worker.start()
    front.send((os.getpid(), worker_end.recv()))
    signal.pause()


def worker_process(end: Connection) -> None:
    end_with_parent()
    end.send(os.getpid())
    signal.pause()


def front_process(end: Connection) -> None:
    context = multiprocessing.get_context("spawn")
    core_end, ours = context.Pipe()
    core = context.Process(target=engine_core, args=(ours,))
    core.start()
    end.send((os.getpid(), *core_end.recv()))
    signal.pause()


def is_gone(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 60)[0])


@pytest.mark.parametrize("killed", [0, 1], ids=["front", "engine core"])
def test_processes_behind_one_that_is_killed_are_killed(killed: int) -> None:
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe()
    front = context.Process(target=front_process, args=(theirs,))
    front.start()
    try:
        pids = ours.recv()
        pidfds = [os.pidfd_open(pid) for pid in pids]
        os.kill(pids[killed], signal.SIGKILL)
        assert all(is_gone(pidfd) for pidfd in pidfds[killed:])
    finally:
        front.kill()
        front.join()


def test_in_a_process_of_ones_own_nothing_changes() -> None:
    code = "from microserve.services.engine.vllm.connector.lifeline import end_with_parent; end_with_parent()"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False, timeout=60).returncode == 0
