"""The proof that a process is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from microserve.kvcache.heap import process
from microserve.kvcache.heap.process import is_gone, this_process
from tests.support.kvcache.heap.heap_child import wait_until

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


def test_a_process_that_is_hidden_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mounted with hidepid, /proc shows no processes of others, or shows them no more."""

    def hidden(pid: int) -> int:
        raise FileNotFoundError(pid)

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        monkeypatch.setattr(process, "_start_time", hidden)
        assert not is_gone(child.pid << 42 | 7)
        child.kill()
        wait_until(lambda: is_gone(child.pid << 42 | 7), "the end of the process")
        child.wait()
    assert is_gone(child.pid << 42 | 7)


_IN_A_NAMESPACE = """
import os, subprocess, sys
from microserve.kvcache.heap.process import is_gone, this_process
assert os.readlink("/proc/self") != str(os.getpid())
assert this_process() >> 42 == os.getpid()
with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
    word = child.pid << 42 | 7
    assert not is_gone(word)
    child.kill()
    child.wait()
assert is_gone(word)
"""


def test_nobody_is_judged_by_the_proc_of_another_namespace() -> None:
    """As after ``unshare --pid`` without ``--mount-proc``: numbers in /proc are others' processes."""
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork"]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no pid namespace can be made here: {error}")

    done = subprocess.run(
        [*unshare, sys.executable, "-c", _IN_A_NAMESPACE], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
