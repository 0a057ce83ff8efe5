"""The proof that a process is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from microserve.kvcache.heap.process import is_gone, this_process
from tests.kvcache.heap_child import wait_until

_SAY_WHO = "from microserve.kvcache.heap.process import this_process; print(this_process(), flush=True)"
# SYS_exit ends one thread; the other goes on.
_LEAVE_MAIN_THREAD = f"""
import ctypes, threading
{_SAY_WHO}
threading.Thread(target=threading.Event().wait).start()
ctypes.CDLL(None).syscall(60, 0)
"""


@pytest.mark.parametrize("code", [f"{_SAY_WHO}; input()", _LEAVE_MAIN_THREAD], ids=["one", "threads"])
def test_a_process_is_gone_when_all_its_threads_are(code: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        word = int(child.stdout.readline())
        if code == _LEAVE_MAIN_THREAD:
            wait_until(lambda: _state(child.pid) == "Z", "the end of the first thread")
        assert not is_gone(word)
        child.send_signal(signal.SIGSTOP)
        assert not is_gone(word)

        child.kill()
        wait_until(lambda: is_gone(word), "the end of the process")
        # Not reaped yet.
        assert _state(child.pid) == "Z"
        child.wait()

    assert is_gone(word)


def test_we_are_not_gone_and_who_had_our_pid_before_us_is() -> None:
    word = this_process()

    assert word >> 42 == os.getpid()
    assert not is_gone(word)
    assert is_gone(word - 1)


def test_a_pid_that_is_a_thread_by_now_names_no_process() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert thread.native_id is not None
        # Whoever had that number started before the thread did.
        assert is_gone(thread.native_id << 42 | 1)
    finally:
        stop.set()
        thread.join()


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
